"""``prompt-tuning suite`` and ``prompt-tuning transfer``: one experiment on many tasks."""

from dataclasses import dataclass
from typing import ClassVar

from prompt_tuning_jax.cli.arguments import option, positional
from prompt_tuning_jax.cli.experiment import StudyOptions, exit_if_stopped


@dataclass(frozen=True, kw_only=True)
class Suite(StudyOptions):
    """Train and evaluate on all tasks of a benchmark, and print the table of scores."""

    name: ClassVar[str] = "suite"
    example: ClassVar[str] = (
        "suite super_glue --config configs/suite_tiny.py --data_dir D --workdir runs/suite"
    )

    suite: str = positional("SUITE")  # benchmark: super_glue or glue
    # Tasks of the suite, for example rte,cb (default: all).
    tasks: tuple[str, ...] = option("A,B", default=())
    # Tasks without training files, for example boolq: train on half of the validation split and
    # evaluate on the other half.  Such scores are not official.
    split_validation: tuple[str, ...] = option("A,B", default=())

    def run(self) -> None:
        experiment = self.study_experiment()
        from prompt_tuning_jax.studies.runs import suite

        result = suite(
            experiment,
            self.suite,
            tasks=self.tasks,
            form=self.form,
            split_validation=self.split_validation,
        )
        exit_if_stopped(result.stopped_by)


@dataclass(frozen=True, kw_only=True)
class Transfer(StudyOptions):
    """Train on one task and evaluate on others: prompt tuning against model tuning."""

    name: ClassVar[str] = "transfer"
    example: ClassVar[str] = (
        "transfer --from squad --to mrqa --config CONFIG.py --data_dir D --workdir runs/t"
    )

    source: str = option("TASK", flag="--from")  # task to train on
    # Tasks to evaluate on; mrqa stands for its out-of-domain tasks.
    targets: tuple[str, ...] = option("A,B", flag="--to")
    # Methods to compare.
    methods: tuple[str, ...] = option("A,B", default=("prompt_tuning", "model_tuning"))
    # Like --set, for model tuning only, which has its own optimizer; repeatable.
    model_set: list[str] = option("FIELD=VALUE", default=[])

    def run(self) -> None:
        experiment = self.study_experiment()
        from prompt_tuning_jax.config.overrides import apply_overrides
        from prompt_tuning_jax.studies.runs import try_transfer

        result = try_transfer(
            experiment,
            self.source,
            self.targets,
            methods=self.methods,
            model_tuning=lambda of: apply_overrides(of, self.model_set),
            form=self.form,
        )
        exit_if_stopped(result.stopped_by)
