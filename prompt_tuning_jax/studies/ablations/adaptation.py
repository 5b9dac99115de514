"""LM-adapts a model for different numbers of steps (Lester et al. 2021, section 3.3)."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from prompt_tuning_jax.checkpoints import train_state
from prompt_tuning_jax.checkpoints.hf.config_files import CONFIG
from prompt_tuning_jax.config.experiment import Experiment, Model
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.conversion import export_model
from prompt_tuning_jax.pretraining.run import pretrain
from prompt_tuning_jax.training.resume import require_run


def adapted_models(
    experiment: Experiment, model: Model, steps: Sequence[int], folder: Path, *, quiet: bool = False
) -> tuple[dict[int, str], int]:
    """Trains ``model`` on the text objectives of ``experiment``, and exports it at each step.

    Returns the models by number of steps (0 is the model itself), and the number of the signal that
    stopped the training, or 0.  One run passes through all steps, so the schedule of learning rates
    ends at the last of them.  Finished exports are kept.  Raises UserError if ``experiment`` has no
    text objectives.
    """
    if not experiment.data.objectives:
        raise UserError(
            "--adapt: the config has no data.objectives; give one such as configs/lm_adapt_tiny.py"
        )

    def of(number: int) -> Experiment:
        optimizer = dataclasses.replace(
            experiment.optimizer, decay_steps=experiment.optimizer.decay_steps or max(steps)
        )
        return dataclasses.replace(
            experiment,
            model=dataclasses.replace(experiment.model, name_or_path=model.name_or_path),
            optimizer=optimizer,
            training=dataclasses.replace(
                experiment.training, steps=number, workdir=str(folder / "run")
            ),
        )

    done = train_state.latest_step(folder / "run" / train_state.LAST)
    require_run(folder / "run", of(max(done, *steps)))  # the exports may be of another config
    models = {}
    for number in sorted(set(steps)):
        if number == 0:
            models[0] = model.name_or_path
            continue
        place = folder / f"steps_{number}"
        if not (place / CONFIG).is_file():
            if done > number:
                raise UserError(
                    f"{place} is missing, and the run in {folder / 'run'} is already past step "
                    f"{number}; remove {folder} to adapt the model again"
                )
            run = pretrain(of(number), quiet=quiet)
            if run.stopped_by:
                return models, run.stopped_by
            export_model(folder / "run", str(place))
        models[number] = str(place)
    return models, 0
