"""``prompt-tuning metrics``."""

from dataclasses import dataclass
from typing import ClassVar

from prompt_tuning_jax.cli.arguments import Command, option, positional
from prompt_tuning_jax.cli.console import print_notes, require_folders
from prompt_tuning_jax.cli.experiment import import_module
from prompt_tuning_jax.untrusted_input import json_text


@dataclass(frozen=True, kw_only=True)
class Metrics(Command):
    """Score predictions of any origin for a task."""

    name: ClassVar[str] = "metrics"
    example: ClassVar[str] = "metrics super_glue_rte_v102 --data_dir D --predictions FILE"

    task: str = positional("NAME")  # task
    # File with one prediction per line: plain text such as True, a JSON string such as "True", or
    # the output of predict --json.
    predictions: str = option("FILE")
    split: str = option("SPLIT", default="validation")  # split of the task
    # Folder of the tasks' data: official files, or prepared by TFDS (also gs://...).
    data_dir: str | None = option("FOLDER", default=None)
    # Python module to import first, for the tasks that it registers.
    module: str | None = option("MODULE", default=None)
    # Also write the predictions in the format of SuperGLUE's server.
    leaderboard: str | None = option("FILE.jsonl", default=None)

    def run(self) -> None:
        require_folders(leaderboard=self.leaderboard)
        from prompt_tuning_jax.inference.scoring import metrics

        import_module(self.module)
        given = self.given("data_dir", "leaderboard")
        scored = metrics(self.task, self.predictions, split=self.split, **given)
        print_notes(scored.notes)
        if scored.scores is not None:
            # A correlation with a constant is nan, which is null in JSON.
            print(json_text(scored.scores, indent=2))
