"""``prompt-tuning predict``."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from prompt_tuning_jax.cli.arguments import mirrors, option, positional
from prompt_tuning_jax.cli.console import counted, require_folders, require_written_form, write_text
from prompt_tuning_jax.cli.experiment import ConfigOptions, DeviceOptions, PromptOptions
from prompt_tuning_jax.errors import UserError, printable_json, printable_lines


@dataclass(frozen=True, kw_only=True)
class Predict(DeviceOptions, ConfigOptions, PromptOptions):
    """Print a prediction for each text, one per line.

    A prediction is a label if the labels are known, and text otherwise.  The template that the
    prompt was trained with is applied to each text, unless --raw is given.
    """

    name: ClassVar[str] = "predict"
    example: ClassVar[str] = "predict --prompt runs/quickstart lovely"

    # Inputs, or paths of images (default: lines of stdin).
    text: list[str] = positional("TEXT", default=[], many=True)
    # File with one input per line.  A .jsonl, .json, .csv, .tsv or .parquet file is read like the
    # prompt's training data, and needs no targets.  Images: a file or a folder of them.
    input: str | None = option("FILE", default=None)
    # Write to this file instead of stdout.  .jsonl and .json are written as with --json, .csv and
    # .tsv as a table: the columns of the input, the prediction and its log-probability.
    output: str | None = option("FILE", default=None)
    json: bool = False  # print JSON lines, with log-probabilities and votes
    raw: bool = False  # do not apply the template to the inputs
    task: str | None = option("NAME", default=None)  # task of the mixture that was trained on
    # Python file with get_config() (default: the config of the prompt's run).
    config: str | None = option("CONFIG.py", default=None)
    model: str | None = mirrors("model.name_or_path", "NAME")

    def run(self) -> None:
        require_folders(output=self.output)
        require_written_form("output", self.output)
        inputs = self._inputs()
        from prompt_tuning_jax.distributed.processes import is_primary
        from prompt_tuning_jax.inference.prediction import UNDESCRIBED, predict
        from prompt_tuning_jax.inference.results import form_of, predictions_text

        form = form_of(self.output) if self.output else None
        if self.json and form in ("csv", "tsv"):
            raise UserError(
                f"--json writes JSON lines, but --output {self.output} is a table; drop one of them"
            )
        experiment = self.experiment(UNDESCRIBED if self.prompt or self.model else None)
        predictions = predict(
            experiment,
            inputs=inputs,
            prompts=self.prompt,
            labels=experiment.data.labels if self.sets("data.labels") else (),
            task=self.task or (experiment.data.task if self.sets("data.task") else ""),
            raw=self.raw,
        )
        if not is_primary():
            return
        form = "jsonl" if self.json else form
        if form is None:
            lines = (" ".join(each.prediction.splitlines()) for each in predictions)
            output = "".join(f"{line}\n" for line in lines)
        else:
            output = predictions_text([] if isinstance(inputs, Path) else inputs, predictions, form)
        if self.output:
            write_text(self.output, output, counted(len(predictions), "prediction"))
        else:
            sys.stdout.write(printable_json(output) if self.json else printable_lines(output))

    def _inputs(self) -> list[str] | Path:
        """Returns texts, or the path of a data file."""
        if self.text and self.input:
            raise UserError("give either TEXT or --input, not both")
        if self.text:
            return _checked(self.text, "TEXT")
        if self.input is None and sys.stdin.isatty():
            raise UserError("no input; give TEXT, --input FILE, or lines on stdin")
        if self.input:
            from prompt_tuning_jax.data.images.files import is_image_file
            from prompt_tuning_jax.data.images.sources import is_image_source
            from prompt_tuning_jax.data.tasks.row_files import is_row_file

            if is_image_file(self.input):
                return [self.input]
            if is_row_file(Path(self.input)) or is_image_source(self.input):
                return Path(self.input)
        try:
            text = Path(self.input).read_text(encoding="utf-8") if self.input else sys.stdin.read()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise UserError(f"cannot read the input {self.input or 'from stdin'}: {why}") from None
        if not text.strip():
            raise UserError(f"the input {self.input or 'from stdin'} is empty")
        lines = text.removeprefix("\ufeff").removesuffix("\n").split("\n")
        return _checked(lines, "line")


def _checked(texts: Sequence[str], name: str) -> list[str]:
    """Returns the texts.

    Raises UserError for bytes that are not UTF-8, which Python reads as surrogates.
    """
    for number, text in enumerate(texts, 1):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError(f"{name} {number} is not UTF-8; write it to a file in UTF-8")
    return [*texts]
