"""Checks the labels of a task before training, and weights their examples in the loss."""

import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from prompt_tuning_jax.config.field_syntax import parse_class_weights
from prompt_tuning_jax.data.tasks.task import Example, Task, matches
from prompt_tuning_jax.errors import UserError, nearest, suggest

_MOST_LISTED = 20


def label_line(counts: Mapping[str, int], labels: Sequence[str]) -> str:
    """Returns ``labels: billing 73, shipping 70, ...``, the most frequent first."""
    return f"labels: {listed_counts({label: counts.get(label, 0) for label in labels})}"


def listed_counts(counts: Mapping[str, int]) -> str:
    """Returns ``billing 73, shipping 70``: the 20 most frequent."""
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    text = ", ".join(f"{_shown(name)} {number:,}" for name, number in ordered[:_MOST_LISTED])
    more = len(ordered) - _MOST_LISTED
    return f"{text} and {more} more" if more > 0 else text


def label_notes(counts: Mapping[str, int], labels: Sequence[str]) -> Iterator[str]:
    """Remarks on suspicious labels of a training set, one line each."""
    seen = [label for label in labels if counts.get(label)]
    if len(seen) == 1:
        yield (
            f"all {counts[seen[0]]:,} training targets are {seen[0]!r}: with one class there is "
            "nothing to learn; if targets are text to generate, set data.targets=text"
        )
    by_spelling: dict[str, list[str]] = {}
    for label in labels:
        by_spelling.setdefault(_normalized(label), []).append(label)
    for names in by_spelling.values():
        if len(names) > 1:
            listed = " and ".join(f"{name!r} ({counts.get(name, 0):,})" for name in names)
            yield f"the labels {listed} look like the same label; if so, spell them alike"
    if seen and all(len(x) > 2 and x[0] == x[-1] and x[0] in "\"'" for x in seen):
        yield f"every label is quoted, as in {seen[0]}; the quotes are part of the label"


def require_labels_known(
    task: Task, title: str, examples: Sequence[Example], *, of_training: bool
) -> None:
    """Raises UserError if no label equals a target in the task's comparison."""
    counts = Counter(example["targets"] for example in examples)
    strange = {
        example["targets"]: example for example in examples if example["targets"] not in task.labels
    }
    unreachable = [t for t, e in strange.items() if not _is_reachable(task, t, e)]
    if not unreachable:
        return
    target = min(unreachable, key=lambda t: (-counts[t], t))
    number = sum(counts[t] for t in unreachable)
    near = near_label(target, task.labels)
    meant = f"; did you mean {near!r}?" if near else ""
    whose = "of the training data" if of_training else "(data.labels)"
    raise UserError(
        f"{title}: the target {_shown(target)!r} is not one of the labels {whose}: "
        f"{', '.join(map(_shown, task.labels[:_MOST_LISTED]))}{meant} ({number:,} of "
        f"{len(examples):,} targets: {listed_counts({t: counts[t] for t in unreachable})}); "
        "spell them alike, list all labels in data.labels, or set data.targets=text if targets are "
        "text to generate"
    )


def near_label(target: str, labels: Sequence[str]) -> str | None:
    """Returns the label that was probably meant.

    It has the same letters or number, or a similar spelling.
    """
    normalized = _normalized(target)
    return next((x for x in labels if _normalized(x) == normalized), None) or nearest(
        target, labels
    )


def is_rewritten(text: str, read_back: str) -> bool:
    """Returns whether two texts differ only in blanks, case, and Unicode normalization."""
    return _letters(text) == _letters(read_back)


def _is_reachable(task: Task, target: str, example: Example) -> bool:
    if task.postprocess is None:
        return False
    wanted = task.postprocess(target, example, True)
    return any(matches(wanted, task.postprocess(x, example, False)) for x in task.labels)


def _letters(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def _normalized(label: str) -> str:
    try:
        return repr(float(label))
    except ValueError:
        letters = _letters(label)
        return "".join(c for c in letters if c.isalnum()) or letters


def _shown(text: str) -> str:
    text = " ".join(text.split()) if "\n" in text else text
    return text if len(text) <= 60 else f"{text[:57]}..."


def example_weights(
    entries: Sequence[str],
    tasks: Sequence[tuple[Sequence[str], Sequence[str]]],
    *,
    prefix: str = "",
) -> np.ndarray:
    """Returns ``[N]`` float32: the weight of each example of all ``tasks``.

    A task is given as (labels, targets).

    ``balanced`` gives an example of a label with n of a task's N examples the weight N / (C * n),
    where C is the number of labels that occur: all labels have the same total weight, and the mean
    is 1.  Otherwise labels that are not listed have weight 1.  So have the examples of a task
    without labels.  Entries may leave out the ``prefix`` that labels and targets have
    (``data.targets_prefix``).

    Raises UserError for a label that no task has, and if every weight is 0.
    """
    known = list(dict.fromkeys(label for labels, _ in tasks for label in labels))
    if not known:
        raise UserError(
            "data.class_weights are for labels, but the targets are text; remove them, or set "
            "data.labels"
        )
    given = {
        label if label in known else f"{prefix}{label}": weight
        for label, weight in parse_class_weights(entries).items()
    }
    for label in given:
        if label not in known:
            raise UserError(f"data.class_weights: no label {label!r}: {suggest(label, known)}")
    weights_N = np.concatenate(
        [_weights_in_task(given, labels, targets) for labels, targets in tasks]
    )
    if not weights_N.any():
        raise UserError(
            "data.class_weights: all examples have weight 0; increase the weight of a label"
        )
    return weights_N


def _weights_in_task(
    given: Mapping[str, float], labels: Sequence[str], targets: Sequence[str]
) -> np.ndarray:
    counts = Counter(targets)
    if not labels:
        by_target = dict.fromkeys(counts, 1.0)
    elif given:
        by_target = {target: given.get(target, 1.0) for target in counts}
    else:
        by_target = {target: len(targets) / (len(counts) * n) for target, n in counts.items()}
    return np.asarray([by_target[target] for target in targets], np.float32)
