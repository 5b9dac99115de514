"""``prompt-tuning analyze``."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from prompt_tuning_jax.cli.arguments import non_negative, option, positional
from prompt_tuning_jax.cli.console import print_json, print_notes
from prompt_tuning_jax.cli.experiment import ConfigOptions, DataOptions
from prompt_tuning_jax.errors import UserError, printable


@dataclass(frozen=True, kw_only=True)
class Analyze(DataOptions, ConfigOptions):
    """Report what prompts are: nearest words, redundancy, similarity, and effects of positions.

    Prompts in a run's folder are evaluated on the data of their run.
    """

    name: ClassVar[str] = "analyze"
    example: ClassVar[str] = "analyze runs/quickstart --output report"

    # Prompt files, adapters, folders of prompts, and runs.
    prompt: list[str] = positional("PROMPT", many=True)
    # Folder for report.html, its figures as PNG files, and analysis.json.
    output: str = option("FOLDER", default="analysis")
    # Config with the model and data of prompts that are in no run's folder.
    config: str | None = option("CONFIG.py", default=None)
    top: int = option("K", default=5)  # nearest words per position
    # Evaluation examples for the effects of positions; 0 skips these.
    examples: int = option("N", default=200, parse=non_negative)
    json: bool = False  # print all numbers as JSON

    def run(self) -> None:
        if not self.prompt:
            raise UserError("name at least one prompt: a file, an adapter, or a run's folder")
        from prompt_tuning_jax.analysis.prompts import analyze
        from prompt_tuning_jax.analysis.report import as_json, summary_rows, write_report
        from prompt_tuning_jax.inference.prediction import UNDESCRIBED
        from prompt_tuning_jax.studies.suite import markdown_rows

        described = bool(self.config or self.gin_file or self.gin_bindings or self.set_fields())
        experiment = self.experiment(default=UNDESCRIBED) if described else None
        analysis = analyze(self.prompt, experiment=experiment, top=self.top, examples=self.examples)
        files = write_report(analysis, Path(self.output))
        print_notes(analysis.notes)
        if self.json:
            print_json(as_json(analysis))
        else:
            for line in markdown_rows(summary_rows(analysis)):
                print(printable(line))
            print(printable(f"report: {files[0]}"))
