"""Decides which runs may resume in a working directory, and with which changes."""

import dataclasses
import os
from contextlib import suppress
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.checkpoints import train_state
from prompt_tuning_jax.checkpoints.run_folder import RESULTS
from prompt_tuning_jax.checkpoints.train_state import LAST
from prompt_tuning_jax.config.config_file import RUN_CONFIG, saved_config
from prompt_tuning_jax.config.experiment import Experiment, Mesh, Training
from prompt_tuning_jax.config.overrides import diff, to_json
from prompt_tuning_jax.config.paths import with_whole_paths
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.storage import atomic_write
from prompt_tuning_jax.training.optim import make_schedule


def claim(folder: Path, experiment: Experiment) -> None:
    """Claims the folder for this run by writing the run's config to it.

    If the folder's run resumes with changes that ``require_run`` allows, replaces its config, after
    removing its results, which belong to a shorter run.  Raises UserError if the folder cannot be
    written, and in the cases of ``require_run``.
    """
    present = require_run(folder, experiment)
    if present is not None:
        if present == run_identity(experiment):
            return
        with suppress(FileNotFoundError):
            (folder / RESULTS).unlink()
    with atomic_write(folder / RUN_CONFIG) as aside:
        aside.write_text(to_json(with_whole_paths(experiment)), encoding="utf-8")


def require_run(
    folder: Path, experiment: Experiment, *, exactly: bool = False
) -> Experiment | None:
    """Returns the config of the folder's run without workdir and mesh, or None without a run.

    Raises UserError, which names the differing fields, if the experiment cannot resume that run.
    Unless ``exactly`` is true, the patience and the division of a batch into microbatches may
    differ.  So may the number of steps, if the learning rates of completed steps do not change.
    """
    config = saved_config(str(folder)) if folder.is_dir() else None
    if config is None:
        return None
    present, wanted = run_identity(config), run_identity(experiment)
    differing = diff(present, wanted)
    if not exactly:
        differing = diff(_what_stays(present), _what_stays(wanted))
    if differing:
        fields = {line.partition(":")[0] for line in differing}
        reasons = [reason for field, reason in _WHY_NOT.items() if field in fields]
        raise UserError(
            f"{folder} holds a run with another config ({'; '.join(differing)}); "
            + "".join(f"{reason}; " for reason in reasons)
            + "use another training.workdir, or remove that one"
        )
    done = train_state.latest_step(folder / LAST)
    _require_same_rates(folder, present, wanted, done=done)
    if wanted.training.steps < done:
        raise UserError(
            f"{folder}: the run has done {done} steps, and training.steps is "
            f"{wanted.training.steps}; set it to {done} or more, or use another training.workdir"
        )
    return present


def _require_same_rates(
    folder: Path, present: Experiment, wanted: Experiment, *, done: int
) -> None:
    """Raises UserError if the learning rates of the completed steps would change."""
    if present == wanted or not done:
        return
    old, new = (
        np.asarray(make_schedule(one.optimizer, total_steps=one.training.steps)(jnp.arange(done)))
        for one in (present, wanted)
    )
    if np.array_equal(old, new):
        return
    kept = present.optimizer.decay_steps or present.training.steps
    raise UserError(
        f"{folder}: training.steps {present.training.steps} -> {wanted.training.steps} would "
        f"change the learning rates of the {done} steps already done, because the "
        f"{present.optimizer.schedule} schedule ends with the run; "
        f"set optimizer.decay_steps={kept} to continue at its final rate, or use another "
        "training.workdir"
    )


def require_place(folder: Path) -> None:
    """Raises UserError if the run's folder cannot be made or written; call it before slow work."""
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not there.is_dir():
        raise UserError(f"{there} is a file; training.workdir (--workdir) must be a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{there} cannot be written; choose another training.workdir (--workdir)")


_WHY_NOT = {
    "training.batch_size": (
        "which examples a step sees follows from its number and the batch size, so that some would "
        "be seen twice and others not at all (training.gradient_accumulation may change: it "
        "computes the same batches in parts)"
    ),
}


def _what_stays(experiment: Experiment) -> Experiment:
    """Returns the experiment with defaults for the fields that may change on resuming."""
    default = Training()
    training = dataclasses.replace(
        experiment.training,
        steps=default.steps,
        patience=default.patience,
        gradient_accumulation=default.gradient_accumulation,
    )
    # ``_require_same_rates`` compares the learning rates themselves.
    optimizer = dataclasses.replace(experiment.optimizer, decay_steps=0)
    return dataclasses.replace(experiment, training=training, optimizer=optimizer)


def run_identity(experiment: Experiment) -> Experiment:
    """Returns the experiment without workdir and mesh, since a run may resume elsewhere.

    Paths are absolute, because relative ones lead to the same files.
    """
    experiment = with_whole_paths(experiment)
    training = dataclasses.replace(experiment.training, workdir="")
    return dataclasses.replace(experiment, training=training, mesh=Mesh())
