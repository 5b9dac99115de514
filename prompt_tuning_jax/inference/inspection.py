"""Describes models, prompts, runs, and files and PEFT adapters with tuned parameters."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from prompt_tuning_jax.checkpoints import run_folder
from prompt_tuning_jax.checkpoints.array_files import require_finite
from prompt_tuning_jax.checkpoints.convert_prompt import prompt_files
from prompt_tuning_jax.checkpoints.destination import PROMPT_SUFFIXES
from prompt_tuning_jax.checkpoints.hf import config_files
from prompt_tuning_jax.checkpoints.hub import is_gguf, is_hub_name
from prompt_tuning_jax.checkpoints.inspect import (
    ModelDescription,
    PromptDescription,
    describe_model,
    describe_prompt,
)
from prompt_tuning_jax.checkpoints.location import INDEX, is_t5x
from prompt_tuning_jax.checkpoints.peft import adapter_file
from prompt_tuning_jax.checkpoints.peft.adapter_file import is_peft, read_config, read_tensors
from prompt_tuning_jax.checkpoints.prompt_file import PromptMetadata
from prompt_tuning_jax.checkpoints.t5x.methods import is_numpy_folder, kind_of, numpy_arrays
from prompt_tuning_jax.checkpoints.tuned_checkpoint import method_of, open_tuned
from prompt_tuning_jax.config.config_file import RUN_CONFIG, run_config
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.config.overrides import to_dict
from prompt_tuning_jax.config.paths import NAMED_MODELS
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.conversion import tuned_files
from prompt_tuning_jax.models.t5.config import T5Config
from prompt_tuning_jax.models.t5gemma.config import T5GemmaConfig


@dataclass(frozen=True, kw_only=True)
class TunedDescription:
    """Describes the tuned parameters of a method.

    ``parameters`` is their total number, and ``dtypes`` the number of each dtype.  ``method`` is
    the class name of the method's config, or a PEFT adapter's ``peft_type``.  ``settings`` are the
    config's values.
    """

    format: str
    method: str
    settings: dict[str, Any]
    parameters: int
    arrays: int
    dtypes: dict[str, int]
    metadata: PromptMetadata
    tasks: tuple[str, ...]


_KINDS: dict[type, str] = {
    ModelDescription: "model",
    PromptDescription: "prompt",
    TunedDescription: "tuned",
}
_Held: TypeAlias = PromptDescription | TunedDescription


def inspect(path: str, *, with_fingerprint: bool | None = None) -> Iterator[tuple[str, str]]:
    """Yields ``describe``'s description as human-readable (field, value) pairs."""
    description = _description(path, with_fingerprint=with_fingerprint)
    if isinstance(description, ModelDescription):
        yield from _model_rows(description)
    elif isinstance(description, PromptDescription):
        yield from _prompt_rows(description)
    elif isinstance(description, TunedDescription):
        yield from _tuned_rows(description)
    elif isinstance(description, Experiment):
        yield from _run_rows(Path(path), description)
    else:
        several = all(isinstance(each, TunedDescription) for each in description.values())
        kind = "files of trainable parameters" if several else "prompts"
        yield "kind", f"{len(description)} {kind}"
        for name, prompt in description.items():
            yield name, _in_short(prompt)


def describe(path: str, *, with_fingerprint: bool | None = None) -> dict[str, Any]:
    """Returns a description as a dictionary that can be written as JSON.

    ``path`` is a model's folder or name, a prompt's file or folder, a file or adapter of another
    method, a folder of such files, or a run's folder.  Raises UserError.
    """
    description = _description(path, with_fingerprint=with_fingerprint)
    if isinstance(description, ModelDescription | PromptDescription | TunedDescription):
        return {"kind": _KINDS[type(description)], **dataclasses.asdict(description)}
    if not isinstance(description, Experiment):
        descriptions = {name: dataclasses.asdict(each) for name, each in description.items()}
        first = next(iter(description.values()))
        kind = "prompts" if isinstance(first, PromptDescription) else "tuned"
        return {"kind": kind, kind: descriptions}
    folder = Path(path)
    return {
        "kind": "run",
        **dict(_run_fields(description)),
        "last_checkpoints": _last_steps(folder),
        "prompts": {n: dataclasses.asdict(p) for n, p in _prompts_of_run(folder).items()},
        "tuned": {n: dataclasses.asdict(t) for n, t in _tuned_of_run(folder).items()},
    }


def _description(
    path: str, *, with_fingerprint: bool | None
) -> ModelDescription | _Held | Experiment | Mapping[str, _Held]:
    place = Path(path)
    if place.is_dir() and (place / RUN_CONFIG).is_file():
        experiment = run_config(path)
        if experiment is not None:
            return experiment
    if trainable := tuned_files(place):
        if trainable == [place]:
            return describe_tuned(place)
        return {file.name: describe_tuned(file) for file in trainable}
    if is_gguf(place) or (place.is_file() and is_t5x(place)):
        return describe_model(path, with_fingerprint=with_fingerprint)
    if place.is_file() or (place.is_dir() and is_peft(place)):
        return describe_prompt(place)
    if place.is_dir() and (files := prompt_files(path)):
        return {file.name: describe_prompt(file) for file in files}
    named = path in NAMED_MODELS or "://" in path or is_hub_name(path)
    if not place.exists() and not named:
        raise UserError(f"{path}: no such file or folder")
    if place.is_dir() and not _may_be_model(place):
        raise UserError(
            f"{path} is not a run ({RUN_CONFIG}), a "
            f"model ({config_files.CONFIG}, or T5X's {INDEX}), a PEFT adapter "
            f"or a folder of prompts{_candidates(place)}"
        )
    return describe_model(path, with_fingerprint=with_fingerprint)


def _may_be_model(folder: Path) -> bool:
    """Returns whether a folder has any trace of a model, so that opening it gives the error."""
    patterns = (
        config_files.CONFIG,
        f"{INDEX}*",
        "checkpoint_*",
        "target.*",
        "state",
        "*.safetensors",
        "*.bin",
    )
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def _candidates(folder: Path) -> str:
    """Returns a hint for the end of a message: recognized files and folders one level down."""

    def known(child: Path) -> bool:
        if not child.is_dir():
            return child.suffix in PROMPT_SUFFIXES
        return (
            (child / RUN_CONFIG).is_file()
            or is_peft(child)
            or bool(prompt_files(str(child)))
            or _may_be_model(child)
        )

    inside = [str(child) for child in sorted(folder.iterdir()) if known(child)]
    return f"; did you mean {' or '.join(inside[:3])}?" if inside else ""


def _model_rows(model: ModelDescription) -> Iterator[tuple[str, str]]:
    form = "T5X checkpoint" if model.is_t5x else "Hugging Face folder"
    yield "kind", f"model ({'GGUF file' if model.is_gguf else form})"
    yield "architecture", model.architecture
    if isinstance(model.config, T5Config | T5GemmaConfig):
        yield "size", model.size or "none of the published"
    yield "layout", model.layout
    yield "parameters", f"{model.parameters:,}"
    kinds = [
        name if len(model.dtypes) == 1 else f"{name} ({n:,})" for name, n in model.dtypes.items()
    ]
    yield "dtype", ", ".join(kinds)
    yield "bytes", f"{model.bytes:,}"
    if model.step is not None:
        yield "step", str(model.step)
        yield "optimizer state", f"{model.optimizer_arrays} arrays"
        if model.trained:
            yield "method", model.method or "unknown"
            name, shape = next(iter(model.trained.items()))
            yield "trained", f"{len(model.trained)} arrays, for instance {name} {list(shape)}"
        else:
            yield "prompt", "none" if model.prompt is None else f"{list(model.prompt)}"
    yield "vocabulary", model.vocabulary or "none"
    for field, value in dataclasses.asdict(model.config).items():
        yield field, str(value)
    yield (
        "fingerprint",
        model.fingerprint or "not computed (--fingerprint)",
    )


def _prompt_rows(prompt: PromptDescription) -> Iterator[tuple[str, str]]:
    yield "kind", f"prompt ({prompt.format})"
    yield "length", str(prompt.length)
    yield "width", str(prompt.width)
    yield "parameters", f"{prompt.length * prompt.width:,}"
    if prompt.left_out:
        yield "left out", f"{prompt.left_out} more rows, the decoder's copy, unused by PEFT itself"
    yield "dtype", str(prompt.dtype)
    yield (
        "row norms",
        f"{prompt.norm_min:.3g} to {prompt.norm_max:.3g}, mean {prompt.norm_mean:.3g}",
    )
    yield "fits", ", ".join(prompt.fits) or "no size known here"
    for field, value in vars(prompt.metadata).items():
        if value not in ("", None, ()):
            yield field.replace("_", " "), str(value)


def _tuned_rows(trainable: TunedDescription) -> Iterator[tuple[str, str]]:
    yield "kind", f"tuned parameters ({trainable.format})"
    yield "method", trainable.method
    yield "parameters", f"{trainable.parameters:,} in {trainable.arrays} arrays"
    yield "dtype", ", ".join(trainable.dtypes)
    for field, value in trainable.settings.items():
        yield field.replace("_", " "), str(value)
    if trainable.tasks:
        yield "tasks", ", ".join(trainable.tasks)
    for field, value in vars(trainable.metadata).items():
        if value not in ("", None, ()):
            yield f"{field}".replace("_", " "), str(value)


def _run_rows(folder: Path, experiment: Experiment) -> Iterator[tuple[str, str]]:
    yield "kind", "run"
    for field, value in _run_fields(experiment):
        yield field, str(value)
    if steps := _last_steps(folder):
        yield "last checkpoints", ", ".join(f"step {step}" for step in steps)
    descriptions: dict[str, _Held] = {**_prompts_of_run(folder), **_tuned_of_run(folder)}
    for name, each in descriptions.items():
        yield name, _in_short(each)


def _run_fields(experiment: Experiment) -> Iterator[tuple[str, Any]]:
    yield "model", experiment.model.name_or_path
    yield "method", type(experiment.method).__name__
    yield "data", experiment.data.train or experiment.data.task
    yield "steps", experiment.training.steps


def _last_steps(folder: Path) -> list[int]:
    names = (step.name for step in (folder / "checkpoints" / "last").glob("[0-9]*"))
    return sorted(int(name) for name in names if name.isdecimal())


def _prompts_of_run(folder: Path) -> dict[str, PromptDescription]:
    files = sorted((folder / run_folder.PROMPTS).glob("*.safetensors"))
    return {file.name: describe_prompt(file) for file in files}


def _tuned_of_run(folder: Path) -> dict[str, TunedDescription]:
    files = sorted((folder / run_folder.TUNED).glob("*.safetensors"))
    return {file.name: describe_tuned(file) for file in files}


def _in_short(description: _Held) -> str:
    known = description.metadata
    if isinstance(description, TunedDescription):
        shape = f"{description.method}, {description.parameters:,} parameters"
    else:
        shape = f"[{description.length}, {description.width}]"
    score = "" if known.score is None else f", {known.metric} {known.score:.2f}"
    step = "" if known.steps is None else f"{' at' if score else ','} step {known.steps}"
    return f"{shape}{score}{step}"


# The fields of an adapter's config that determine its computation.
_OF_ADAPTERS = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias"),
    *("target_modules", "modules_to_save", "feedforward_modules"),
    *("num_virtual_tokens", "num_layers", "num_tasks", "num_ranks", "token_dim"),
)


def describe_tuned(path: Path) -> TunedDescription:
    """Describes one of ``conversion.tuned_files``; raises UserError if it is damaged."""
    tasks: tuple[str, ...] = ()
    if path.is_dir() and is_numpy_folder(path):
        arrays = {name: array.whole() for name, array in numpy_arrays(path).items()}
        kind, settings, form = kind_of(arrays) or "unknown", {}, "arrays of a T5X checkpoint"
        metadata = PromptMetadata()
    elif path.is_dir():
        described = read_config(path / adapter_file.CONFIG)
        arrays, _ = read_tensors(path)
        version = f"peft {described.get('peft_version') or ''}".rstrip()
        metadata = PromptMetadata(
            model_name=str(described.get("base_model_name_or_path") or ""), created_by=version
        )
        kind = str(described.get("peft_type"))
        settings = {n: described[n] for n in _OF_ADAPTERS if described.get(n) is not None}
        form = "PEFT adapter"
    else:
        stored = open_tuned(path)
        require_finite(stored.trainable, of=str(path))
        method = method_of(stored, path)
        kind, settings, form = type(method).__name__, to_dict(method), "safetensors"
        arrays, metadata, tasks = dict(stored.trainable), stored.metadata, stored.tasks
    dtypes: Counter[str] = Counter()
    for array in arrays.values():
        dtypes[array.dtype.name] += array.size
    return TunedDescription(
        format=form,
        method=kind,
        settings=settings,
        parameters=dtypes.total(),
        arrays=len(arrays),
        dtypes=dict(dtypes),
        metadata=metadata,
        tasks=tasks,
    )
