"""``prompt-tuning tasks``."""

from dataclasses import dataclass
from typing import ClassVar

from prompt_tuning_jax.cli.arguments import Command, option, positional
from prompt_tuning_jax.cli.console import require_folders
from prompt_tuning_jax.cli.experiment import import_module
from prompt_tuning_jax.errors import UserError, printable


@dataclass(frozen=True, kw_only=True)
class Tasks(Command):
    """List the tasks, or show examples of one as the model sees them."""

    name: ClassVar[str] = "tasks"
    example: ClassVar[str] = "tasks word_valence --split test"

    task: str | None = positional("NAME", default=None)  # show examples of this task
    all: bool = False  # list every name, with each form and version of a task
    split: str | None = option("SPLIT", default=None)  # split of the task (default: train)
    limit: int | None = option("N", default=None)  # number of examples (default: 5)
    # Show the numbers of examples, of each label, and of tokens instead of examples.
    statistics: bool = False
    # Folder of the tasks' data: official files, or prepared by TFDS (also gs://...).
    data_dir: str | None = option("FOLDER", default=None)
    # Python module to import first, for the tasks that it registers.
    module: str | None = option("MODULE", default=None)
    # Model whose vocabulary splits the texts (default: tiny).
    model: str | None = option("NAME", default=None)
    # Vocabulary, instead of a model's; bytes for ByT5's.
    vocabulary: str | None = option("FILE", default=None)
    # Write all examples to this file, with the token ids of untrimmed texts and EOS.
    dump: str | None = option("FILE.jsonl", default=None)

    def run(self) -> None:
        require_folders(dump=self.dump)
        import_module(self.module)
        if self.task is None:
            for name in self.given("model", "vocabulary", "split", "limit", "statistics", "dump"):
                raise UserError(f"--{name} needs the NAME of a task")
            self._list()
            return
        if self.all:
            raise UserError(f"--all lists all tasks; leave out {self.task!r}, or --all")
        if self.model is not None and self.vocabulary is not None:
            raise UserError("--model and --vocabulary both name a vocabulary; give one")
        for name in ("dump", "statistics"):
            if getattr(self, name) and self.given("limit"):
                raise UserError(f"--{name} reads all examples; leave out --limit")
        if self.dump and self.statistics:
            raise UserError("give either --dump or --statistics")
        from prompt_tuning_jax.cli.task_listing import dump, examples, statistics

        options = self.given("model", "vocabulary", "data_dir", "split")
        if self.dump:
            number = dump(self.task, self.dump, **options)
            print(f"wrote {number:,} examples to {self.dump}")
            return
        if self.statistics:
            for name, value in statistics(self.task, **options):
                print(f"{name}: {printable(value)}")
            return
        for example in examples(self.task, **options, **self.given("limit")):
            for name, value in example.items():
                print(f"{name}: {printable(str(value))}")
            print()

    def _list(self) -> None:
        from prompt_tuning_jax.cli.task_listing import tasks

        if self.all and self.data_dir is not None:
            raise UserError("--data_dir lists the tasks whose data is there, and --all all tasks")
        options = self.given("data_dir") | ({"every": True} if self.all else {})
        rows = list(tasks(**options))
        width = max((len(name) for name, text in rows if text is not None), default=0)
        for number, (name, text) in enumerate(rows):
            if text is None:  # a heading
                print(f"\n{name}" if number else name)
            else:
                print(f"{name:{width}}  {text}".rstrip())
