"""Scores predictions of any origin on a task and writes leaderboard files, without JAX."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prompt_tuning_jax.data.tasks.registry import get_task
from prompt_tuning_jax.data.tasks.selection import use_data_dir
from prompt_tuning_jax.data.tasks.t5_tasks.leaderboard import submission
from prompt_tuning_jax.data.tasks.t5_tasks.official_lines import parse_json, text_lines
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.storage import text_output


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Scores by metric, in percent (None if the split has no labels), and notes for the user."""

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
    """Scores a file with one prediction per line, in the order of the task's examples.

    Examples without a label are not counted; a split without labels has no scores.  If
    ``leaderboard`` is given, the predictions are written to that file in the format of SuperGLUE's
    server.  Raises UserError if the numbers of predictions and examples differ, and for a line that
    cannot be read.
    """
    use_data_dir(data_dir)
    task = get_task(name)
    examples = list(task.load(split, data_dir))
    texts = read_predictions(Path(predictions))
    if len(texts) != len(examples):
        raise UserError(
            f"{predictions} has {len(texts):,} predictions and {name}, split {split!r}, has "
            f"{len(examples):,} examples; give one per line, in the order of `tasks --dump`"
        )
    notes = []
    if leaderboard:
        written = submission(task, examples, texts)
        with text_output(leaderboard) as file:
            file.writelines(f"{line}\n" for line in written.lines)
        named = Path(leaderboard).name == written.file
        rename = "" if named else f"; the server wants it under the name {written.file}"
        notes.append(f"wrote {leaderboard}{rename}")
        if written.invalid:
            notes.append(
                f"{written.invalid:,} predictions are not labels and were written as "
                f"{(*task.labels, 'False')[0]!r}"
            )
    labeled = task.labeled(examples)
    if not labeled or not task.metrics:
        notes.append(f"{name}, split {split!r}, has no labels: there is nothing to score")
        return Scored(scores=None, notes=tuple(notes))
    if len(labeled) < len(examples):
        notes.append(f"{len(examples) - len(labeled):,} examples have no label and do not count")
    scores = task.score([examples[i] for i in labeled], [texts[i] for i in labeled])
    return Scored(scores=scores, notes=tuple(notes))


def read_predictions(path: Path) -> Sequence[str]:
    """Reads one prediction per line: bare texts, JSON strings, or output of ``predict --json``.

    All lines must be of one kind.  Among bare texts, a blank line is an empty text.  Raises
    UserError that names a line that does not fit.
    """
    lines = list(text_lines(path))
    starts = {line.lstrip()[:1] for _, line in lines if line.strip()}
    if starts != {"{"} and '"' not in starts:
        return [line for _, line in lines]
    texts: list[str] = []
    blank = 0
    for number, line in lines:
        if not line.strip():
            blank = blank or number
            continue
        if blank:
            raise UserError(f'{path}:{blank}: a blank line; an empty prediction is written ""')
        if starts != {"{"} and not line.lstrip().startswith('"'):
            raise UserError(
                f"{path}:{number}: {line[:40]} is not in double quotes, and other lines are; write "
                'all as bare text, all as JSON strings ("True"), or all as `predict --json` does'
            )
        value = parse_json(line, f"{path}:{number}")
        if isinstance(value, dict):
            value = value.get("prediction")
        if not isinstance(value, str):
            raise UserError(f'{path}:{number}: an object without a text as its "prediction"')
        texts.append(value)
    return texts
