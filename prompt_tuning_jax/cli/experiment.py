"""Options that describe an experiment, shared by the commands that have one."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from prompt_tuning_jax.cli.arguments import (
    Command,
    mirrored_fields,
    mirrors,
    non_negative,
    option,
    positive,
)
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.config.field_syntax import MESH_AXES
from prompt_tuning_jax.errors import UserError

_MESH_FIELDS = (*MESH_AXES, *(f"dcn_{axis}" for axis in MESH_AXES))


@dataclass(frozen=True, kw_only=True)
class OverrideOptions(Command):
    """``--set``, and the options that are short for it."""

    group: ClassVar[str] = "config"

    # Set any field of the config, for example optimizer.learning_rate=0.1; repeatable.
    overrides: list[str] = option("FIELD=VALUE", flag="--set", default=[])

    def sets(self, field: str) -> bool:
        """Returns whether ``--set`` names this field."""
        return any(_field_of(override) == field for override in self.overrides)

    def set_fields(self) -> dict[str, str]:
        """Returns the fields that the command line sets, and the option that sets each."""
        options = mirrored_fields(type(self)).items()
        given = {field: f"--{name}" for name, field in options if getattr(self, name) is not None}
        return given | {_field_of(x): f"--set {_field_of(x)}" for x in self.overrides}

    def all_overrides(self) -> list[str]:
        """Returns the overrides of all options, those of ``--set`` last."""
        options = mirrored_fields(type(self)).items()
        values = [(field, getattr(self, name)) for name, field in options]
        mesh = getattr(self, "mesh", None)
        return [
            *(f"{field}={value}" for field, value in values if value is not None),
            *(mesh_overrides(mesh) if mesh is not None else []),
            *self.overrides,
        ]


@dataclass(frozen=True, kw_only=True)
class ConfigOptions(OverrideOptions):
    """A config file or gin files, changed by options; ``experiment`` puts them together."""

    group: ClassVar[str] = "config"

    gin_file: list[str] = option("FILE.gin", default=[])  # gin file; repeatable
    gin_search_paths: str = option("A,B", default="")  # folders to search for gin files
    # Gin binding, also written --gin.NAME=VALUE; repeatable.
    gin_bindings: list[str] = option("NAME=VALUE", default=[])

    def experiment(self, default: Experiment | None = None) -> Experiment:
        """Returns the experiment that the arguments describe.

        ``default`` is used for prompts that neither a run nor a config describes; it may have no
        task.
        """
        from prompt_tuning_jax.compilation import keep_compiled_programs
        from prompt_tuning_jax.config.config_file import run_config
        from prompt_tuning_jax.config.no_effect import require_effect
        from prompt_tuning_jax.config.overrides import apply_overrides
        from prompt_tuning_jax.config.validation import validate

        keep_compiled_programs()
        prompts: list[str] = getattr(self, "prompt", [])
        for path in prompts:
            if not Path(path).exists():
                raise UserError(f"--prompt {path}: no such file or folder")
        base = self._base(default, prompts)
        experiment = apply_overrides(base, self.all_overrides())
        if base is not default or experiment.data.task or experiment.data.train:
            experiment = validate(experiment)  # otherwise the command completes it first
        require_effect(
            self.set_fields(),
            experiment,
            command=self.name,
            prompts=len(prompts),
            bare_prompts=any(run_config(prompt) is None for prompt in prompts),
        )
        return experiment

    def _base(self, default: Experiment | None, prompts: Sequence[str]) -> Experiment:
        """Returns the experiment before any override."""
        from prompt_tuning_jax.config.config_file import load_config, run_config

        config: str | None = getattr(self, "config", None)
        gin = bool(self.gin_file or self.gin_bindings)
        if config and gin:
            raise UserError(f"give either {config} or gin files and bindings, not both")
        if config:
            return load_config(config)
        if gin:
            from prompt_tuning_jax.config.gin import experiment_from_gin

            paths = self.gin_search_paths.split(",")
            return experiment_from_gin(self.gin_file, self.gin_bindings, paths)
        for prompt in prompts:
            if (saved := run_config(prompt)) is not None:
                return saved
        if self.set_fields().keys() & {"data.train", "data.eval"}:
            from prompt_tuning_jax.cli.init import own_data_experiment

            return own_data_experiment()
        if default is not None:
            return default
        ways = ["CONFIG.py (prompt-tuning init lists examples)", "--gin_file=FILE.gin"]
        if isinstance(self, DataOptions):
            ways.append("--data and --eval_data with your own files")
        if hasattr(self, "prompt"):
            ways.append("--prompt of a run")
        message = f"no config; give {', '.join(ways[:-1])} or {ways[-1]}"
        if prompts:
            message += (
                f". {prompts[0]} is not part of a run, so say what to do with it, for example "
                f"prompt-tuning {self.name} --prompt {prompts[0]} --eval_data FILE.jsonl"
            )
        raise UserError(message)


@dataclass(frozen=True, kw_only=True)
class DataOptions(Command):
    """The model and the data of an experiment."""

    group: ClassVar[str] = "model and data"

    model: str | None = mirrors("model.name_or_path", "NAME")
    data: str | None = mirrors("data.train", "FILE")
    eval_data: str | None = mirrors("data.eval", "FILE")
    data_dir: str | None = mirrors("data.data_dir", "FOLDER")


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(Command):
    """The mesh of devices, and the processes of a run on several hosts."""

    group: ClassVar[str] = "devices"

    # Sizes of the mesh axes data, fsdp and model (dcn_data, dcn_fsdp, dcn_model: numbers of
    # slices); -1 stands for all remaining devices.
    mesh: str | None = option("data=2,model=4", default=None)
    # Address of process 0; only where the hosts do not find each other by themselves, as they do on
    # TPU pods, SLURM and Kubernetes.
    coordinator_address: str | None = option("HOST:PORT", default=None)
    process_count: int | None = option("N", default=None)  # number of processes; 1: only this one
    # Index of this process, from 0.
    process_index: int | None = option("I", default=None, parse=non_negative)
    # How long another process may be silent before the run stops.
    process_timeout: int = option("SECONDS", default=60, parse=positive)


@dataclass(frozen=True, kw_only=True)
class PromptOptions(Command):
    """The prompts, or what other methods trained, that a command uses."""

    # Prompt file, PEFT adapter, file of another method, folder of these, or run of any method (its
    # best checkpoints); repeatable.
    prompt: list[str] = option("PATH", default=[])


@dataclass(frozen=True, kw_only=True)
class StudyOptions(ConfigOptions):
    """What suite and transfer take, which do one experiment for each of several tasks."""

    group: ClassVar[str] = "experiment"

    config: str | None = option("CONFIG.py", default=None)  # config of each task
    # Form of the tasks: ordinary, taskless or task_index.
    form: str = option("FORM", default="taskless")
    workdir: str | None = mirrors("training.workdir", "FOLDER")
    # Seeds; the default is the config's, or 0,1,2,3,4 where it has one.
    seeds: str | None = mirrors("training.seeds", "0,1,2")
    steps: str | None = mirrors("training.steps")
    model: str | None = mirrors("model.name_or_path", "NAME")
    data_dir: str | None = mirrors("data.data_dir", "FOLDER")

    def study_experiment(self) -> Experiment:
        """Returns the experiment of each task, with five seeds unless the user names some."""
        from prompt_tuning_jax.studies.suite import SUITE_FIELDS

        for override in self.overrides:
            if (field := _field_of(override)) in SUITE_FIELDS:
                raise UserError(f"--set {field} has no effect: each task sets it")
        experiment = self.experiment()
        if "training.seeds" in self.set_fields():
            return experiment
        from prompt_tuning_jax.studies.runs import with_seeds

        return with_seeds(experiment)


def mesh_overrides(text: str) -> list[str]:
    """Returns ``data=2,model=4`` as overrides of the fields of ``mesh``.

    Raises UserError for any other text.
    """
    overrides = []
    for part in text.split(","):
        axis, _, number = (piece.strip() for piece in part.partition("="))
        if axis not in _MESH_FIELDS or not re.fullmatch(r"-?\d+", number):
            raise UserError(
                f"--mesh {text}: {part!r} is not AXIS=NUMBER; axes are {', '.join(_MESH_FIELDS)}"
            )
        overrides.append(f"mesh.{axis}={number}")
    return overrides


def import_module(name: str | None) -> None:
    """Imports the module that the command line names, if it names one."""
    if name:
        from prompt_tuning_jax.data.tasks import selection

        selection.import_module(name)


def exit_if_stopped(stopped_by: int) -> None:
    """Exits as a shell reports a program that a signal has ended."""
    if stopped_by:
        sys.exit(128 + stopped_by)


def _field_of(override: str) -> str:
    return override.partition("=")[0].strip()
