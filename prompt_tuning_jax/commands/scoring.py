"""Scores anybody's predictions for a task, and writes them for a leaderboard."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prompt_tuning_jax.checkpoints.atomic import written_aside
from prompt_tuning_jax.data.t5_tasks.glue import has_label
from prompt_tuning_jax.data.t5_tasks.leaderboard import submission
from prompt_tuning_jax.data.t5_tasks.official_lines import parse_json, text_lines
from prompt_tuning_jax.data.task import get_task
from prompt_tuning_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Scored:
    """``scores`` by metric, in percent; None where the split has no labels.  ``notes``: lines."""

    scores: dict[str, float] | None
    notes: tuple[str, ...]


def metrics(
    name: str,
    predictions: str,
    *,
    split: str = "validation",
    data_dir: str = "",
    leaderboard: str = "",
) -> Scored:
    """Scores a file of predictions, one JSON string a line in the order of the task's examples.

    Examples without label do not count; a split without any has no scores.  ``leaderboard`` is a
    file to write the predictions to as SuperGLUE's server takes them.  UserError where the number
    of predictions is not that of the examples, and for a line that is no JSON string.
    """
    task = get_task(name)
    examples = list(task.load(split, data_dir))
    texts = read_predictions(Path(predictions))
    if len(texts) != len(examples):
        raise UserError(
            f"{predictions} has {len(texts):,} predictions and {name}, split {split!r}, has "
            f"{len(examples):,} examples; one a line is needed, in the order of `tasks --dump`"
        )
    notes = []
    if leaderboard:
        written = submission(task, examples, texts)
        with written_aside(Path(leaderboard)) as aside:
            aside.write_text("".join(f"{line}\n" for line in written.lines), encoding="utf-8")
        notes.append(f"wrote {leaderboard}; the server wants it under the name {written.file}")
        if written.invalid:
            notes.append(
                f"{written.invalid:,} predictions are no labels and were written as "
                f"{(*task.labels, 'False')[0]!r}"
            )
    labelled = [i for i, example in enumerate(examples) if has_label(example)]
    if not labelled or not task.metrics:
        notes.append(f"{name}, split {split!r}, has no labels: there is nothing to score")
        return Scored(scores=None, notes=tuple(notes))
    if len(labelled) < len(examples):
        notes.append(f"{len(examples) - len(labelled):,} examples have no label and do not count")
    scores = task.score([examples[i] for i in labelled], [texts[i] for i in labelled])
    return Scored(scores=scores, notes=tuple(notes))


def read_predictions(path: Path) -> Sequence[str]:
    """The JSON strings of a file, one a line; UserError naming the line that is none."""
    texts: list[str] = []
    blank = 0
    for number, line in text_lines(path):
        if not line.strip():
            blank = blank or number
            continue
        if blank:
            raise UserError(f'{path}:{blank}: a blank line; an empty prediction is written ""')
        text = parse_json(line, f"{path}:{number}")
        if not isinstance(text, str):
            raise UserError(
                f"{path}:{number}: {json.dumps(text)[:40]} is not a JSON string; write "
                'one prediction in double quotes a line, as in "True"'
            )
        texts.append(text)
    return texts
