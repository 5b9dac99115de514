"""Reads and writes a run's files: prompts, other methods' arrays, results and best members."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prompt_tuning_jax.checkpoints import train_state
from prompt_tuning_jax.checkpoints.prompt_file import PromptMetadata, save_prompt
from prompt_tuning_jax.checkpoints.train_state import BEST
from prompt_tuning_jax.checkpoints.tuned_checkpoint import TunedCheckpoint, save_tuned
from prompt_tuning_jax.config.config_file import RUN_CONFIG
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.config.methods import split_init
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.storage import atomic_write, expanded
from prompt_tuning_jax.typing import HostArray
from prompt_tuning_jax.untrusted_input import json_text, read_json_file

PROMPTS, TUNED = "prompts", "tuned"
RESULTS, CURVES = "results.json", "curves.png"


@dataclass(frozen=True, kw_only=True)
class Best:
    """A member's best evaluation so far: its step, and all its metrics."""

    step: int
    metrics: Mapping[str, float]


def is_run(folder: Path) -> bool:
    """Returns whether the folder belongs to a run."""
    return (folder / RUN_CONFIG).is_file()


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically; nan becomes null."""
    with atomic_write(path) as aside:
        aside.write_text(json_text(value, indent=2) + "\n", encoding="utf-8")


def export_prompt(folder: Path, name: str, prompt_PD: HostArray, metadata: PromptMetadata) -> None:
    """Writes a run's prompt as ``prompts/NAME.safetensors`` (with metadata) and ``.npy``."""
    for suffix in ("npy", "safetensors"):
        save_prompt(folder / PROMPTS / f"{name}.{suffix}", prompt_PD, metadata=metadata)


def export_tuned(folder: Path, name: str, stored: TunedCheckpoint) -> None:
    """Writes the trained arrays of a method other than prompts as ``tuned/NAME.safetensors``."""
    save_tuned(folder / TUNED / f"{name}.safetensors", stored)


def prompt_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """Returns the best prompt file of each member, in order; UserError if one is missing."""
    files = [folder / PROMPTS / f"{name}.safetensors" for name in names]
    for file in files:
        if not file.is_file():
            raise UserError(
                f"{folder} has no {file.relative_to(folder)} yet: the run has not been evaluated; "
                "continue training, or name a prompt file"
            )
    return files


def read_best(folder: Path) -> dict[str, HostArray]:
    """Returns the best trained arrays of a run's members, with leading axis E, for any method."""
    return read_best_and_model(folder)[0]


def read_best_and_model(folder: Path) -> tuple[dict[str, HostArray], str]:
    """Returns ``read_best``, and the fingerprint of the frozen model that the run used."""
    leaves, extra = _best_checkpoint(folder)
    trainable = {name for name in leaves if name.startswith("trainable/")}
    best = {name.removeprefix("trainable/"): np.asarray(leaves[name]) for name in trainable}
    fingerprint = extra.get("fingerprint")
    if not isinstance(fingerprint, str):
        raise UserError(
            f"{folder / BEST} does not say which frozen model it was trained on (fingerprint); "
            "it was not written by a run"
        )
    return best, fingerprint


def best_evaluations(folder: Path) -> tuple[Best | None, ...]:
    """Returns the best evaluation of each member of a run."""
    _, extra = _best_checkpoint(folder)
    return tuple(bests_from_json(extra["best"]))


@dataclass(frozen=True, kw_only=True)
class Results:
    """The part of ``results.json`` besides scores: the progress of the run, and why it stopped."""

    step: int
    stopped_early: bool


def read_results(folder: Path) -> Results | None:
    """Returns how a run ended, or None if it has not; UserError if the file is not a run's."""
    path = folder / RESULTS
    if not path.is_file():
        return None
    value = read_json_file(path)
    step = value.get("step") if isinstance(value, dict) else None
    early = value.get("stopped_early") if isinstance(value, dict) else None
    if not isinstance(step, int) or not isinstance(early, bool):
        raise UserError(f"{path} is not the results of a run; remove it to have it written again")
    return Results(step=step, stopped_early=early)


def _best_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    checkpoint = train_state.read_latest(
        folder / BEST,
        advice=(
            f"use the files in {folder / PROMPTS} or {folder / TUNED}, or remove "
            f"{(folder / BEST).parent} and {folder / RESULTS} and train again"
        ),
    )
    if checkpoint is None:
        kept = next((folder / name for name in (PROMPTS, TUNED) if (folder / name).is_dir()), None)
        if kept is None and not (folder / RESULTS).is_file():
            raise UserError(f"{folder} has no best checkpoint yet: the run has not been evaluated")
        instead = f"use the files in {kept}, or " if kept else ""
        raise UserError(
            f"{folder / BEST} is gone, and the run has been evaluated: put it back, or {instead}"
            f"remove {(folder / BEST).parent} and {folder / RESULTS} and train again"
        )
    _, leaves, extra = checkpoint
    return leaves, extra


def bests_to_json(bests: Sequence[Best | None]) -> list[Any]:
    """Converts the best evaluations to JSON values; nan becomes null."""
    return [best and {"step": best.step, "metrics": dict(best.metrics)} for best in bests]


def bests_from_json(listed: Sequence[Any]) -> list[Best | None]:
    """Returns the inverse of ``bests_to_json``; null among the metrics becomes nan."""
    return [
        Best(
            step=entry["step"],
            metrics={name: math.nan if x is None else x for name, x in entry["metrics"].items()},
        )
        if entry
        else None
        for entry in listed
    ]


def member_names(experiment: Experiment) -> tuple[str, ...]:
    """Returns a file name for each member, which distinguishes it from the others."""
    training = experiment.training
    names = []
    for number, seed in enumerate(training.seeds):
        parts = [f"seed_{seed}"]
        if training.learning_rates:
            parts.append(f"lr_{training.learning_rates[number]!r}")
        if training.inits:
            init, path = split_init(training.inits[number])
            parts.append(f"{init}_{number}" if path else init)
        names.append("_".join(parts))
    return tuple(names)


def workdir_of(experiment: Experiment) -> Path:
    """Returns the run's folder; UserError if none is named."""
    if not experiment.training.workdir:
        raise UserError("training.workdir is empty; say where to keep the run with --workdir")
    return expanded(experiment.training.workdir)
