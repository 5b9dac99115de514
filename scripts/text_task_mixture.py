"""Registers the tasks of ``scripts/write_text_tasks``, and mixtures of all but one of them.

A module for ``data.module``: with this folder on PYTHONPATH, set ``data.module=text_task_mixture``,
``data.data_dir`` to the folder of the tasks, and ``data.task`` to ``small_NAME``, or to
``all_but_NAME`` for the mixture without a task (``all_but_word_valence`` has the four of the
folder).
"""

from collections.abc import Iterable
from pathlib import Path

from prompt_tuning_jax.data.tasks.metrics import get_metric
from prompt_tuning_jax.data.tasks.registry import get_task, register
from prompt_tuning_jax.data.tasks.row_files import RowFile
from prompt_tuning_jax.data.tasks.task import Mixture, Row, Source, Task, row_is_example
from prompt_tuning_jax.errors import UserError

LABELS = {
    "subjectivity": ("opinion", "story"),
    "sentence_polarity": ("beautiful", "terrible"),
    "qc": ("letter", "number", "person", "place", "reason", "thing"),
    "qc_number": ("many", "much", "year"),
}


def _file(name: str, split: str, data_dir: str) -> RowFile:
    path = Path(data_dir) / name / f"{split}.jsonl"
    if not data_dir or not path.is_file():
        raise UserError(f"{path} is missing; write it with scripts/write_text_tasks (--data_dir)")
    return RowFile(path=path)


def _task(name: str, labels: tuple[str, ...]) -> Task:
    def rows(split: str, data_dir: str) -> Iterable[Row]:
        return (row for _, row in _file(name, split, data_dir).rows())

    def fingerprint(split: str, data_dir: str) -> str:
        return _file(name, split, data_dir).fingerprint()

    return Task(
        name=f"small_{name}",
        source=Source(splits=("train", "validation", "test"), rows=rows, fingerprint=fingerprint),
        preprocess=row_is_example,
        labels=labels,
        metrics=(get_metric("accuracy"),),
        from_text=lambda text: text,
    )


TASKS = {name: _task(name, labels) for name, labels in LABELS.items()}
for task in TASKS.values():
    register(task)
for left_out in (*TASKS, "word_valence"):
    names = [name for name in (*TASKS, "word_valence") if name != left_out]
    members = tuple(TASKS[name] if name in TASKS else get_task(name) for name in names)
    register(Mixture(name=f"all_but_{left_out}", tasks=members, rates=(1.0,) * len(members)))
