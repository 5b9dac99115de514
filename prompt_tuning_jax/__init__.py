"""Prompt tuning of frozen language models and vision transformers in JAX and Flax NNX.

>>> import prompt_tuning_jax as pt
>>> model = pt.load_model("tiny")
>>> pt.generate(model, ["valence: excellent"], prompt=pt.load_prompt("prompt.npy"))
"""

__version__ = "0.1.0"

TYPE_CHECKING = False  # typing's own would be an import, and this is the first of a command
if TYPE_CHECKING:
    from typing import Any

    from prompt_tuning_jax.checkpoints.load import load_model
    from prompt_tuning_jax.checkpoints.prompt_file import load_prompt, save_prompt
    from prompt_tuning_jax.config.experiment import Experiment
    from prompt_tuning_jax.errors import UserError
    from prompt_tuning_jax.inference.api import encode, generate, logits, score
    from prompt_tuning_jax.inference.conversion import convert
    from prompt_tuning_jax.inference.evaluation import evaluate
    from prompt_tuning_jax.inference.loading import attach
    from prompt_tuning_jax.inference.prediction import predict
    from prompt_tuning_jax.pretraining.run import pretrain
    from prompt_tuning_jax.training.run import train

# Imported when first asked for, so that importing the package is quick.
_EXPORTS = {
    "Experiment": "config.experiment",
    "UserError": "errors",
    "attach": "inference.loading",
    "convert": "inference.conversion",
    "encode": "inference.api",
    "evaluate": "inference.evaluation",
    "generate": "inference.api",
    "load_model": "checkpoints.load",
    "load_prompt": "checkpoints.prompt_file",
    "save_prompt": "checkpoints.prompt_file",
    "logits": "inference.api",
    "predict": "inference.prediction",
    "pretrain": "pretraining.run",
    "score": "inference.api",
    "train": "training.run",
}

__all__ = [  # noqa: RUF022  # in the order in which they are used
    "load_model",
    "load_prompt",
    "save_prompt",
    "attach",
    "predict",
    "encode",
    "generate",
    "score",
    "logits",
    "train",
    "pretrain",
    "evaluate",
    "convert",
    "Experiment",
    "UserError",
]


def __getattr__(name: str) -> "Any":
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    from inspect import isfunction

    value = getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    if isfunction(value):
        from prompt_tuning_jax.errors import with_named_arguments

        value = with_named_arguments(value)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
