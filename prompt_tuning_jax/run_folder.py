"""A run's working directory: its config, its prompts, its best members."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prompt_tuning_jax.checkpoints import train_state
from prompt_tuning_jax.checkpoints.atomic import written_aside
from prompt_tuning_jax.checkpoints.prompt_file import PromptMetadata, save_prompt
from prompt_tuning_jax.checkpoints.train_state import BEST
from prompt_tuning_jax.checkpoints.tuned_file import StoredTuned, save_tuned
from prompt_tuning_jax.config_file import RUN_CONFIG, saved_config
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.experiment import Experiment, Mesh
from prompt_tuning_jax.overrides import diff, to_json
from prompt_tuning_jax.training.loop import Best
from prompt_tuning_jax.typing import HostArray
from prompt_tuning_jax.whole_paths import with_whole_paths

PROMPTS, TUNED = "prompts", "tuned"
RESULTS, CURVES = "results.json", "curves.png"


def claim(folder: Path, experiment: Experiment) -> None:
    """Makes the folder this run's: writes its config, or finds the same one there.

    Raises UserError where the folder cannot be written, or holds a run with another config (and
    says which fields differ).
    """
    present = saved_config(str(folder)) if folder.is_dir() else None
    if present is not None:
        present = with_whole_paths(present)  # of a run from before they were kept whole
        differing = diff(_what_decides(present), _what_decides(experiment))
        if differing:
            raise UserError(
                f"{folder} holds a run with another config ({'; '.join(differing)}); use another "
                "training.workdir, or remove that one"
            )
        return
    with written_aside(folder / RUN_CONFIG) as aside:
        aside.write_text(to_json(experiment), encoding="utf-8")


def is_run(folder: Path) -> bool:
    """Whether the folder has been claimed by some run."""
    return (folder / RUN_CONFIG).is_file()


def write_json(path: Path, value: Any) -> None:
    """Writes JSON aside and renames it."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def export_prompt(folder: Path, name: str, prompt_PD: HostArray, metadata: PromptMetadata) -> None:
    """Writes a run's prompt as ``prompts/NAME.safetensors`` (with metadata) and ``.npy``."""
    for suffix in ("npy", "safetensors"):
        save_prompt(folder / PROMPTS / f"{name}.{suffix}", prompt_PD, metadata=metadata)


def export_tuned(folder: Path, name: str, stored: StoredTuned) -> None:
    """Writes what a run of another method than prompts keeps as ``tuned/NAME.safetensors``."""
    save_tuned(folder / TUNED / f"{name}.safetensors", stored)


def prompt_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """The best prompts of a run, in the order of its members; UserError where one is missing."""
    files = [folder / PROMPTS / f"{name}.safetensors" for name in names]
    for file in files:
        if not file.is_file():
            raise UserError(
                f"{folder} has no {file.relative_to(folder)} yet: the run has not been evaluated; "
                "train on, or name a prompt file"
            )
    return files


def read_best(folder: Path) -> dict[str, HostArray]:
    """The best tuned arrays of a run's members, with their leading axis E, for any method."""
    return read_best_and_model(folder)[0]


def read_best_and_model(folder: Path) -> tuple[dict[str, HostArray], str]:
    """The same, and the fingerprint of the frozen model that they were trained on."""
    leaves, extra = _best_checkpoint(folder)
    tuned = {name for name in leaves if name.startswith("tuned/")}
    best = {name.removeprefix("tuned/"): np.asarray(leaves[name]) for name in tuned}
    fingerprint = extra.get("fingerprint")
    if not isinstance(fingerprint, str):
        raise UserError(
            f"{folder / BEST} does not say which frozen model it was trained on (fingerprint); "
            "it was not written by a run"
        )
    return best, fingerprint


def best_evaluations(folder: Path) -> tuple[Best | None, ...]:
    """The best evaluation of each member of a run."""
    _, extra = _best_checkpoint(folder)
    return tuple(Best(**best) if best else None for best in extra["best"])


def require_place(folder: Path) -> None:
    """Raises UserError where a run's folder cannot be, before anything long is begun."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{there} is a file; training.workdir (--workdir) wants a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{there} cannot be written; choose another training.workdir (--workdir)")


def _best_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    found = train_state.read_latest(folder / BEST)
    if found is None:
        raise UserError(f"{folder} has no best checkpoint yet: the run has not been evaluated")
    _, leaves, extra = found
    return leaves, extra


def _what_decides(experiment: Experiment) -> Experiment:
    """All but the run's place and its devices: it may go on elsewhere."""
    training = dataclasses.replace(experiment.training, workdir="")
    return dataclasses.replace(experiment, training=training, mesh=Mesh())
