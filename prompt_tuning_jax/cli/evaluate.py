"""``prompt-tuning eval``."""

from dataclasses import dataclass
from typing import ClassVar

from prompt_tuning_jax.cli.arguments import option, positional
from prompt_tuning_jax.cli.console import counted, require_folders, require_written_form, write_text
from prompt_tuning_jax.cli.experiment import (
    ConfigOptions,
    DataOptions,
    DeviceOptions,
    PromptOptions,
)
from prompt_tuning_jax.errors import UserError, printable
from prompt_tuning_jax.untrusted_input import json_text


@dataclass(frozen=True, kw_only=True)
class Eval(DeviceOptions, DataOptions, ConfigOptions, PromptOptions):
    """Score each prompt, or what another method trained, and the vote of all of them."""

    name: ClassVar[str] = "eval"
    example: ClassVar[str] = "eval --prompt runs/quickstart --split test"

    # Python file with get_config() (default: the config of the prompt's run).
    config: str | None = positional("CONFIG.py", default=None)
    # Split of the task (default: data.eval_split).
    split: str | None = option("SPLIT", default=None)
    output: str | None = option("FILE.json", default=None)  # also write the scores to this file
    # Also write a row for each example: its input and target, the prediction of each prompt, the
    # vote and log-probabilities.  The format is JSON lines, or a table for .csv and .tsv.
    predictions: str | None = option("FILE", default=None)

    def run(self) -> None:
        require_folders(output=self.output, predictions=self.predictions)
        require_written_form("predictions", self.predictions)
        experiment = self.experiment()
        if self.data and not experiment.data.eval and not self.split:
            raise UserError(
                "--data is the training file, which defines the labels; name the examples to "
                "evaluate on with --eval_data"
            )
        if (
            self.eval_data
            and not self.data
            and self.split not in (None, experiment.data.eval_split)
        ):
            raise UserError(
                f"--split {self.split} has no effect: --eval_data names the examples to score; "
                "drop one of them"
            )
        from prompt_tuning_jax.distributed.processes import is_primary
        from prompt_tuning_jax.inference.evaluation import evaluate, prediction_rows
        from prompt_tuning_jax.inference.results import (
            evaluated_text,
            form_of,
            print_scores,
            scores_as_dict,
        )

        labels = experiment.data.labels if self.sets("data.labels") else ()
        result = evaluate(experiment, prompts=self.prompt, split=self.split, labels=labels)
        if not is_primary():
            return
        for line in result.reports:
            print(printable(line))
        print_scores(result)
        if self.output:
            write_text(self.output, json_text(scores_as_dict(result), indent=2) + "\n", "scores")
        if self.predictions:
            rows = list(prediction_rows(result))
            text = evaluated_text(rows, form_of(self.predictions) or "jsonl")
            write_text(self.predictions, text, counted(len(rows), "prediction"))
