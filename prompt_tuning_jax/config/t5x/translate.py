"""A launch of T5X as an experiment: where the parts of a translation come together."""

from dataclasses import fields, replace
from typing import Any

from prompt_tuning_jax.config.base import field_types
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.config.gin_syntax import Reference
from prompt_tuning_jax.config.methods import METHODS, MethodConfig, PromptTuning
from prompt_tuning_jax.config.overrides import checked_experiment
from prompt_tuning_jax.config.t5x.launch import Launch, Value
from prompt_tuning_jax.config.t5x.method import translate_method
from prompt_tuning_jax.config.t5x.model import (
    translate_checkpoint,
    translate_dropout,
    translate_model,
)
from prompt_tuning_jax.config.t5x.run import (
    translate_evaluation_data,
    translate_mesh,
    translate_optimizer,
    translate_training,
    translate_training_data,
)
from prompt_tuning_jax.config.t5x.translation import LaunchCommand, Translation
from prompt_tuning_jax.config.t5x.unread import classify_unread

# The function that a script of T5X runs, the script's module, and the command here.
_SCRIPTS: tuple[tuple[str, str, LaunchCommand], ...] = (
    ("train", "t5x.train", "train"),
    ("evaluate", "t5x.eval", "eval"),
    ("infer", "t5x.infer", "predict"),
    ("precompile", "t5x.precompile", "plan"),
)
_REMAT = {"none": "none", "minimal": "dots", "full": "full"}


def translate(launch: Launch, *, restored_step: int | None = None) -> Translation:
    """Translates a launch, or files that are parts of one.

    Args:
      launch: its bindings.
      restored_step: step of the checkpoint that it starts from; None: that in its name.

    Raises:
      UserError: for a value of the wrong type, and for a launch that would not train.
    """
    t = Translation(launch=launch)
    run = None
    for script, named, command in _SCRIPTS:
        for module in ("__main__", named):
            if launch.binds(f"{module}.{script}"):
                run, t.command = Reference((), f"{module}.{script}", True), command
    model = _given(t.get(run, "model")) or _given(launch.macro("MODEL"))
    network = translate_model(t, model)
    step = _translate_checkpoint(t, run, restored_step)
    _translate_computation(t, network)
    wrapper = model.value if model and isinstance(model.value, Reference) else None
    trained = translate_optimizer(t, launch.reference(wrapper, "optimizer_def"), step)
    translate_method(t, network or _macro_reference(launch, "ARCHITECTURE"), trained)
    if run is not None and t.command in ("train", "plan"):
        translate_training_data(t, run)
        translate_training(t, run, step)
    elif run is not None:
        translate_evaluation_data(t, launch.reference(run, "dataset_cfg"))
    translate_mesh(t, launch.reference(run, "partitioner"))
    classify_unread(t)
    return t


def translated_experiment(t: Translation) -> Experiment:
    """Returns the experiment of a translation; fields that it does not set have their defaults."""
    values: dict[str, Any] = {}
    for section in fields(Experiment):
        cls = (
            _method_class(t) if section.name == "method" else field_types(Experiment)[section.name]
        )
        known = {f.name for f in fields(cls)}
        given = t.settings.get(section.name, {})
        values[section.name] = replace(
            cls(), **{name: one.value for name, one in given.items() if name in known}
        )
    return checked_experiment(Experiment(**values))


def _method_class(t: Translation) -> type[MethodConfig]:
    return next((cls for cls in METHODS.values() if cls.__name__ == t.method), PromptTuning)


def _given(value: Value | None) -> Value | None:
    return None if value is None or value.is_missing else value


def _macro_reference(launch: Launch, name: str) -> Reference | None:
    value = launch.macro(name)
    return value.value if value and isinstance(value.value, Reference) else None


def _translate_checkpoint(t: Translation, run: Reference | None, step: int | None) -> int:
    checkpoints = t.launch.reference(run, "checkpoint_cfg")
    restore = t.launch.reference(run, "restore_checkpoint_cfg")
    restore = restore or t.launch.reference(checkpoints, "restore")
    restore = restore or Reference((), "t5x.utils.RestoreCheckpointConfig", True)
    return translate_checkpoint(t, restore, step=step, is_launch=run is not None)


def _translate_computation(t: Translation, network: Reference | None) -> None:
    config = t.launch.reference(network, "config")
    translate_dropout(t, config, t.get(config or network, "dtype"))
    remat = t.get(t.launch.reference(network, "encoder_factory"), "layer_remat")
    if remat and isinstance(remat.value, str) and remat.value in _REMAT:
        t.set("training.remat", _REMAT[remat.value], remat)
    elif remat and remat.value is not None:
        t.lost(remat, f"training.remat is one of {', '.join(_REMAT.values())}")
