"""``prompt-tuning train``."""

import os
from dataclasses import dataclass
from typing import ClassVar

from prompt_tuning_jax.cli.arguments import mirrors, positional
from prompt_tuning_jax.cli.experiment import (
    ConfigOptions,
    DataOptions,
    DeviceOptions,
    exit_if_stopped,
)
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Train(DeviceOptions, DataOptions, ConfigOptions):
    """Train prompts, or another tuning method, on a frozen model."""

    name: ClassVar[str] = "train"
    example: ClassVar[str] = "train configs/quickstart.py --set optimizer.learning_rate=0.1"

    config: str | None = positional("CONFIG.py", default=None)  # Python file with get_config()
    workdir: str | None = mirrors("training.workdir", "FOLDER")
    seeds: str | None = mirrors("training.seeds", "0,1,2")
    steps: str | None = mirrors("training.steps")
    batch_size: str | None = mirrors("training.batch_size")
    learning_rate: str | None = mirrors("optimizer.learning_rate")

    def run(self) -> None:
        experiment = self.experiment()
        self._require_files(experiment)
        from prompt_tuning_jax.training.run import needs_pretraining, train

        if needs_pretraining(experiment):
            from prompt_tuning_jax.pretraining.run import pretrain as train
        result = train(experiment)
        if not result.finished:
            exit_if_stopped(result.stopped_by)

    def _require_files(self, experiment: Experiment) -> None:
        """Raises UserError where the config's placeholder for a data file was not replaced."""
        data, given = experiment.data, self.set_fields()
        for option, field, path in (
            ("data", "data.train", data.train),
            ("eval_data", "data.eval", data.eval),
        ):
            if path and field not in given and not os.path.exists(os.path.expanduser(path)):
                raise UserError(
                    f"--{option} is missing: name the file with your examples (the config's "
                    f"{field}={path} does not exist)"
                )
