"""``prompt-tuning ablate``."""

from dataclasses import dataclass, replace
from typing import ClassVar

from prompt_tuning_jax.cli.arguments import mirrors, option, positional
from prompt_tuning_jax.cli.experiment import ConfigOptions, exit_if_stopped
from prompt_tuning_jax.config.experiment import Data, Experiment
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.storage import expanded

_SEEDS = (0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Ablate(ConfigOptions):
    """Train with several values of one setting, and draw the scores (figures 1 and 3 of the paper).

    Runs that share a program train at once on one frozen model.  The same command resumes an
    interrupted ablation.
    """

    name: ClassVar[str] = "ablate"
    example: ClassVar[str] = (
        "ablate length --config configs/quickstart.py --lines init=uniform,class_labels "
        "--workdir runs/length"
    )

    # What varies: length, init, learning_rate, method, size (names of models), objective and
    # lm_steps (NAME=MODEL), ensemble (the number of its members), or any field of the config, for
    # example method.prompt_to_input.
    setting: str = positional("SETTING")
    # Values of the setting (default: those of the paper, if it has any).  objective:
    # span_corruption=MODEL, sentinel=MODEL, lm_adaptation=MODEL; lm_steps: STEPS=MODEL, or STEPS
    # with --adapt.
    values: tuple[str, ...] = option("A,B", default=())
    # A second setting, with one line of the figure for each of its values.  An ensemble compares
    # methods.
    lines: str | None = option("SETTING=A,B", default=None)
    # Split to score the best checkpoints on (default: the validation scores that chose them).
    test_split: str | None = option("SPLIT", default=None)
    test_data: str | None = option("FILE", default=None)  # like --test_split, with your own file
    # Let the first seed choose each method's learning rate on the validation split.
    search: bool = False
    measure: bool = False  # measure the time and memory of a step
    # Largest number of prompts that train at once (default: as many as the device holds).
    at_once: int = 0
    # With lm_steps and objective: config of the LM adaptation of the model, whose data.train is a
    # folder of texts.
    adapt: str | None = option("CONFIG.py", default=None)
    config: str | None = option("CONFIG.py", default=None)  # config of each run
    workdir: str | None = mirrors("training.workdir", "FOLDER")
    # Seeds; the default is the config's, or 0,1,2 where it has one.
    seeds: str | None = mirrors("training.seeds", "0,1,2")
    steps: str | None = mirrors("training.steps")
    model: str | None = mirrors("model.name_or_path", "NAME")
    data: str | None = mirrors("data.train", "FILE")
    eval_data: str | None = mirrors("data.eval", "FILE")
    data_dir: str | None = mirrors("data.data_dir", "FOLDER")

    def run(self) -> None:
        if self.test_split and self.test_data:
            raise UserError("give --test_split or --test_data, not both")
        if self.adapt and self.setting not in ("lm_steps", "objective"):
            raise UserError(f"--adapt is for lm_steps and objective, not for {self.setting}")
        experiment = self.experiment()
        if self.test_split and experiment.data.eval:
            raise UserError(
                "--test_split is for registered tasks, and the examples come from data.eval="
                f"{experiment.data.eval}; give the file to score with --test_data"
            )
        if len(experiment.training.seeds) < 2 and "training.seeds" not in self.set_fields():
            training = replace(experiment.training, seeds=_SEEDS)
            experiment = replace(experiment, training=training)
        from prompt_tuning_jax.studies.ablations.axes import Value, get_axis, values_of
        from prompt_tuning_jax.studies.ablations.ensembles import ensembles
        from prompt_tuning_jax.studies.ablations.grid import Grid
        from prompt_tuning_jax.studies.ablations.points import Settings
        from prompt_tuning_jax.studies.ablations.run import ablate

        settings = Settings(
            at_once=self.at_once,
            test=self._test(experiment.data),
            search=self.search,
            measure=self.measure,
        )
        if self.setting == "ensemble":
            if self.values:
                raise UserError("--values has no effect on ensemble: --seeds are its members")
            named, _, listed = (self.lines or "method=prompt_tuning,full").partition("=")
            if named != "method":
                raise UserError(f"--lines {named}: an ensemble compares methods: method=A,B")
            axis = get_axis(named, option="--lines")
            methods = values_of(axis, _listed(listed), option="--lines")
            exit_if_stopped(ensembles(experiment, methods, settings).stopped_by)
            return
        axis = get_axis(self.setting, option="ablate")
        line_axis = None
        lines: tuple[Value, ...] = ()
        if self.lines is not None:
            named, equals, listed = self.lines.partition("=")
            line_axis = get_axis(named, option="--lines")
            lines = values_of(line_axis, _listed(listed) if equals else (), option="--lines")
        elif self.setting == "size":
            line_axis = get_axis("method", option="--lines")
            lines = values_of(line_axis, (), option="--lines")
        texts = self._adapted(experiment) if self.adapt else self.values
        grid = Grid(
            axis=axis,
            values=values_of(axis, texts, option="--values"),
            line_axis=line_axis,
            lines=lines,
        )
        exit_if_stopped(ablate(experiment, grid, settings).stopped_by)

    def _test(self, data: Data) -> Data | None:
        if self.test_data:
            return replace(data, eval=self.test_data)
        return replace(data, eval_split=self.test_split) if self.test_split else None

    def _adapted(self, experiment: Experiment) -> tuple[str, ...]:
        """LM-adapts the model, and returns --values with the names of the adapted models."""
        from prompt_tuning_jax.config.config_file import load_config
        from prompt_tuning_jax.studies.ablations.adaptation import adapted_models

        config = load_config(str(self.adapt))
        if self.setting == "objective":
            if self.values:
                raise UserError("--adapt makes the models of objective; leave out --values")
            steps = [0, config.training.steps]
        else:
            steps = [int(text) for text in self.values if text.isdecimal()]
            if len(set(steps)) != len(self.values) or not steps:
                raise UserError(
                    "--values: with --adapt, give different numbers of steps, for example 0,100"
                )
        workdir = experiment.training.workdir
        if not workdir:
            raise UserError("training.workdir is empty; say where to keep the runs with --workdir")
        folder = expanded(workdir) / "adapted"
        models, stopped_by = adapted_models(config, experiment.model, steps, folder)
        exit_if_stopped(stopped_by)
        if self.setting == "lm_steps":
            return tuple(f"{number}={models[number]}" for number in steps)
        return (
            f"span_corruption={models[0]}",
            f"sentinel={models[0]}",
            f"lm_adaptation={models[steps[1]]}",
        )


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
