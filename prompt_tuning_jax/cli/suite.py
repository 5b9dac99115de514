"""``prompt-tuning suite`` and ``prompt-tuning transfer``: one experiment on many tasks."""

from dataclasses import dataclass
from typing import ClassVar

from prompt_tuning_jax.cli.arguments import non_negative, option, positional, positive
from prompt_tuning_jax.cli.experiment import DeviceOptions, StudyOptions, exit_if_stopped
from prompt_tuning_jax.errors import UserError

_EXAMPLES = 32  # training examples of a target of --spot


@dataclass(frozen=True, kw_only=True)
class Suite(DeviceOptions, StudyOptions):
    """Train and evaluate on all tasks of a benchmark, and print the table of scores.

    It can run as several processes, like train; the same command resumes.
    """

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
    """Train on one task and evaluate on others: prompt tuning against model tuning.

    With --spot, try soft prompt transfer (SPoT) instead: prompts of the targets start from the
    prompts of the sources, and train on few examples.  With --to_model, recycle prompts on another
    version of the model, and compare them with prompts that are trained on it.
    """

    name: ClassVar[str] = "transfer"
    example: ClassVar[str] = (
        "transfer --from squad --to mrqa --config CONFIG.py --data_dir D --workdir runs/t"
    )

    # Task to train on; with --spot or --to_model, several.  There, a task may also be a folder with
    # train.jsonl and validation.jsonl.
    source: tuple[str, ...] = option("TASK", flag="--from")
    # Tasks to evaluate on; mrqa stands for its out-of-domain tasks.  With --spot, tasks to train on
    # from the prompts of the sources (default: the sources, each from the others).
    targets: tuple[str, ...] = option("A,B", flag="--to", default=())
    # Methods to compare.
    methods: tuple[str, ...] = option("A,B", default=("prompt_tuning", "model_tuning"))
    # Like --set, for model tuning only, which has its own optimizer; repeatable.
    model_set: list[str] = option("FIELD=VALUE", default=[])
    # Try soft prompt transfer: a prompt's own start against that of the most similar source, and of
    # the best one.
    spot: bool = False
    # With --spot: training examples of each target, drawn by each seed (default: 32); 0: all.
    examples: int | None = option("N", default=None, parse=non_negative)
    # With --spot: training steps of the sources (default: as many as those of the targets).
    source_steps: int | None = option("N", default=None, parse=positive)
    # Recycle the prompts of --from on this model, which has the same vocabulary.
    to_model: str | None = option("MODEL", default=None)
    # With --spot and --to_model: split to score the best checkpoints on (default: the validation
    # split).
    test_split: str | None = option("SPLIT", default=None)

    def run(self) -> None:
        self._require_effect()
        experiment = self.study_experiment()
        if self.spot:
            from prompt_tuning_jax.studies.spot import spot

            done = spot(
                experiment,
                self.source,
                self.targets or self.source,
                examples=_EXAMPLES if self.examples is None else self.examples,
                source_steps=self.source_steps or 0,
                form=self.form,
                test_split=self.test_split or "",
            )
            exit_if_stopped(done.stopped_by)
            return
        if self.to_model:
            from prompt_tuning_jax.studies.recycling import recycled_prompts

            done = recycled_prompts(
                experiment,
                self.source,
                model=self.to_model,
                form=self.form,
                test_split=self.test_split or "",
            )
            exit_if_stopped(done.stopped_by)
            return
        from prompt_tuning_jax.config.overrides import apply_overrides
        from prompt_tuning_jax.studies.runs import try_transfer

        result = try_transfer(
            experiment,
            self.source[0],
            self.targets,
            methods=self.methods,
            model_tuning=lambda of: apply_overrides(of, self.model_set),
            form=self.form,
        )
        exit_if_stopped(result.stopped_by)

    def _require_effect(self) -> None:
        """Raises UserError for options that have no effect on this kind of transfer."""
        if self.spot and self.to_model:
            raise UserError("give --spot or --to_model, not both")
        used: tuple[str, ...] = ("targets", "methods", "model_set")
        what = "without --spot"
        if self.spot:
            used, what = ("targets", "examples", "source_steps", "test_split"), "with --spot"
        elif self.to_model:
            used, what = ("test_split",), "with --to_model"
        flags = {"targets": "to"}
        for name in ("targets", "methods", "model_set", "examples", "source_steps", "test_split"):
            given = bool(self.model_set) if name == "model_set" else bool(self.given(name))
            if given and name not in used:
                raise UserError(f"--{flags.get(name, name)} has no effect {what}")
        if self.spot or self.to_model:
            return
        if len(self.source) != 1:
            raise UserError("--from: name one task; several are for --spot and --to_model")
        if not self.targets:
            raise UserError("--to is needed: the tasks to evaluate on")
