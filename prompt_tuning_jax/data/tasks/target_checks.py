"""What is said about targets before anything is trained, and what is refused."""

import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prompt_tuning_jax.data.tasks.task import Example, Task
from prompt_tuning_jax.errors import UserError, nearest

_MOST_LISTED = 20


def label_line(counts: Mapping[str, int], labels: Sequence[str]) -> str:
    """``labels: billing 73, shipping 70, ...``, the most frequent first."""
    return f"labels: {listed_counts({label: counts.get(label, 0) for label in labels})}"


def listed_counts(counts: Mapping[str, int]) -> str:
    """``billing 73, shipping 70``: at most 20, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    text = ", ".join(f"{_shown(name)} {number:,}" for name, number in ordered[:_MOST_LISTED])
    more = len(ordered) - _MOST_LISTED
    return f"{text} and {more} more" if more > 0 else text


def label_notes(counts: Mapping[str, int], labels: Sequence[str]) -> Iterator[str]:
    """What is odd about the labels of a training set, a line each."""
    seen = [label for label in labels if counts.get(label)]
    if len(seen) == 1:
        yield (
            f"all {counts[seen[0]]:,} targets to train on are {seen[0]!r}: with one class there is "
            "nothing to learn; if it is text to generate, set data.targets=text"
        )
    alike: dict[str, list[str]] = {}
    for label in labels:
        alike.setdefault(_likeness(label), []).append(label)
    for names in alike.values():
        if len(names) > 1:
            listed = " and ".join(f"{name!r} ({counts.get(name, 0):,})" for name in names)
            yield f"the labels {listed} look like one label; if they are, write them alike"
    if seen and all(len(x) > 2 and x[0] == x[-1] and x[0] in "\"'" for x in seen):
        yield f"every label stands in quote marks, as {seen[0]}; they are part of the text"


def require_labels_known(
    task: Task, title: str, examples: Sequence[Example], *, of_training: bool
) -> None:
    """UserError where a target equals no label, by the task's own comparison: it cannot be met."""
    counts = Counter(example["targets"] for example in examples)
    strange = {
        example["targets"]: example for example in examples if example["targets"] not in task.labels
    }
    unmet = [t for t, e in strange.items() if not _is_met(task, t, e)]
    if not unmet:
        return
    target = min(unmet, key=lambda t: (-counts[t], t))
    number = sum(counts[t] for t in unmet)
    near = near_label(target, task.labels)
    meant = f"; did you mean {near!r}?" if near else ""
    whose = "that the training data has" if of_training else "(data.labels)"
    raise UserError(
        f"{title}: the target {_shown(target)!r} is none of the labels {whose}: "
        f"{', '.join(map(_shown, task.labels[:_MOST_LISTED]))}{meant} ({number:,} of "
        f"{len(examples):,} targets: {listed_counts({t: counts[t] for t in unmet})}); write both "
        "alike, name all labels in data.labels, or set data.targets=text if they are text to "
        "generate"
    )


def near_label(target: str, labels: Sequence[str]) -> str | None:
    """The label that was probably meant: of the same letters or number, or spelt nearly so."""
    likeness = _likeness(target)
    return next((x for x in labels if _likeness(x) == likeness), None) or nearest(target, labels)


def is_rewritten(text: str, read_back: str) -> bool:
    """Whether two texts differ in blanks, case, and the form of their characters alone."""
    return _letters(text) == _letters(read_back)


def same_value(a: Any, b: Any) -> bool:
    """Equality of what a postprocessor may return, arrays included."""
    equal = a == b
    return bool(equal.all()) if hasattr(equal, "all") else bool(equal)


def _is_met(task: Task, target: str, example: Example) -> bool:
    if task.postprocess is None:
        return False
    wanted = task.postprocess(target, example, True)
    return any(same_value(task.postprocess(x, example, False), wanted) for x in task.labels)


def _letters(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def _likeness(label: str) -> str:
    try:
        return repr(float(label))
    except ValueError:
        letters = _letters(label)
        return "".join(c for c in letters if c.isalnum()) or letters


def _shown(text: str) -> str:
    text = " ".join(text.split()) if "\n" in text else text
    return text if len(text) <= 60 else f"{text[:57]}..."
