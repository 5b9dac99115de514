"""The tasks, and their examples as the model sees them."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from prompt_tuning_jax.data.batching.tokenize import encode_inputs
from prompt_tuning_jax.data.tasks.labels import listed_counts
from prompt_tuning_jax.data.tasks.registry import get_mixture, get_task, task_names
from prompt_tuning_jax.data.tasks.selection import use_data_dir
from prompt_tuning_jax.data.tasks.t5_tasks.registry import (
    ALIASES,
    FORMS,
    form_of,
    forms_of,
)
from prompt_tuning_jax.data.tasks.t5_tasks.sources import number_of_rows
from prompt_tuning_jax.data.tasks.t5_tasks.t5_task import T5Task
from prompt_tuning_jax.data.tasks.t5_tasks.tables import T5_TASKS
from prompt_tuning_jax.data.tasks.task import Example, Task
from prompt_tuning_jax.data.vocabularies.vocab import AnyVocabulary, load_vocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.storage import text_output

_TITLES = {
    "super_glue": "SuperGLUE",
    "glue": "GLUE",
    "dpr": "Pronouns (DPR)",
    "squad": "Question answering",
    "mrqa": "Question answering (MRQA)",
    "summarization": "Summaries",
}
# Prefixes of the names of tasks of later papers.
_LATER_PAPERS = {
    "spot_": "Source tasks of SPoT",
    "pr:": "Tasks of prompt recycling",
}
_TEXTS_AT_ONCE = 1024


def tasks(*, data_dir: str = "", every: bool = False) -> Iterator[tuple[str, str | None]]:
    """Yields the tasks as (name, description), with (heading, None) before each group.

    The forms and versions of a task share a row, and the heading lists them; with ``every``, each
    name has a row, and aliases too.  With ``data_dir`` a description begins with the number of rows
    of each split that the folder holds.
    """
    if every:
        for name in task_names():
            yield name, get_mixture(name).description
        for alias, name in sorted(ALIASES.items()):
            yield alias, f"alias of {name}"
        return
    base = T5_TASKS
    in_forms = {form_of(name)[1] for name in task_names()}
    for benchmark, title in _TITLES.items():
        group = [t for t in base.values() if t.benchmark == benchmark and not _is_later(t, base)]
        yield _heading(title, group, base), None
        for task in group:
            yield task.name, _with_sizes(task, data_dir) + task.description
    yield from _later_papers()
    mixtures = {}
    others = []
    for name in task_names():
        if name.startswith(tuple(_LATER_PAPERS)):
            continue
        mixture = get_mixture(name)
        alone = mixture.tasks[0].name == name and not mixture.evaluated
        form, own = form_of(name)
        if own in base or (form != "ordinary" and own in in_forms and own in task_names()):
            continue
        if alone:
            others.append((name, mixture.description))
        elif "_v200" not in name:
            mixtures[name] = mixture.description
    if mixtures:
        yield f"Mixtures (those of forms also with {_prefixes(FORMS[1:])})", None
        yield from mixtures.items()
    if others:
        yield "Others", None
        yield from others
    yield (
        "--all lists every name; NAME shows examples; --data_dir FOLDER shows numbers of rows",
        None,
    )


def _later_papers() -> Iterator[tuple[str, str | None]]:
    for prefix, title in _LATER_PAPERS.items():
        number = sum(name.startswith(prefix) for name in task_names())
        yield f"{title}: {number} names that begin with {prefix} (--all lists them)", None


def examples(
    name: str,
    *,
    split: str = "train",
    limit: int = 5,
    model: str = "tiny",
    vocabulary: str = "",
    data_dir: str = "",
) -> Iterator[dict[str, Any]]:
    """Yields the first examples of a task as the model sees them: texts, ids with EOS, lengths.

    The examples of a mixture come from each of its tasks that have the split, with ``task``.
    ``vocabulary`` is a file or ``bytes``, by default the vocabulary of ``model``.
    """
    words = _vocabulary(model, vocabulary)
    use_data_dir(data_dir)
    mixture = get_mixture(name)
    tasks = mixture.evaluated_on(split)
    alone = mixture.tasks[0].name == mixture.name
    for task in tasks:
        each = limit if alone else max(1, limit // len(tasks))
        for example in islice(task.load(split, data_dir), each):
            shown: dict[str, Any] = {} if alone else {"task": task.name}
            shown |= example
            sides = zip(("inputs", "targets"), _ids(task, [example], words)[0], strict=True)
            for side, ids in sides:
                if side == "targets" and not task.labeled([example]):
                    shown["targets"] = "(none: this split has no labels)"
                    continue
                shown[f"{side}_ids"] = ids
                shown[f"{side}_length"] = len(ids)
            yield shown


def statistics(
    name: str,
    *,
    split: str = "train",
    model: str = "tiny",
    vocabulary: str = "",
    data_dir: str = "",
) -> Iterator[tuple[str, str]]:
    """Counts a split's examples, labels and tokens (EOS included), as (name, text)."""
    words = _vocabulary(model, vocabulary)
    use_data_dir(data_dir)
    mixture = get_mixture(name)
    for task in mixture.evaluated_on(split):
        counts: Counter[str] = Counter()
        lengths: dict[str, list[int]] = {"inputs": [], "targets": []}
        rows = task.load(split, data_dir)
        while some := list(islice(rows, _TEXTS_AT_ONCE)):
            counts.update(some[number]["targets"] for number in task.labeled(some))
            for inputs, targets in _ids(task, some, words):
                lengths["inputs"].append(len(inputs))
                lengths["targets"].append(len(targets))
        if task.name != mixture.name:
            yield "task", task.name
        yield f"examples of {split}", f"{len(lengths['inputs']):,}"
        if task.labels:
            yield "labels", _shares({label: counts.get(label, 0) for label in task.labels})
        others = {target: n for target, n in counts.items() if target not in task.labels}
        if others:
            kind = "targets that are no label" if task.labels else "different targets"
            most = (
                f"; the most frequent: {listed_counts(others)}" if max(others.values()) > 1 else ""
            )
            yield kind, f"{len(others):,} of {sum(others.values()):,}{most}"
        for side, each in lengths.items():
            if each and (side == "inputs" or counts):
                ordered = sorted(each)
                yield (
                    f"tokens of {side}",
                    f"{ordered[0]} to {ordered[-1]}, median {ordered[len(ordered) // 2]}, 95 % up "
                    f"to {ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]}",
                )


def _shares(counts: Mapping[str, int]) -> str:
    whole = max(sum(counts.values()), 1)
    return ", ".join(f"{label} {n:,} ({100 * n / whole:.1f} %)" for label, n in counts.items())


def dump(
    name: str,
    path: str,
    *,
    split: str = "train",
    model: str = "tiny",
    vocabulary: str = "",
    data_dir: str = "",
) -> int:
    """Writes all examples of a split as JSON lines, in the order of the data; returns their number.

    Each line has ``inputs``, ``targets``, and their untrimmed ids with EOS: ``inputs_ids``,
    ``targets_ids``.
    """
    words = _vocabulary(model, vocabulary)
    use_data_dir(data_dir)
    task = get_task(name)
    number = 0
    with text_output(path) as file:
        rows = task.load(split, data_dir)
        while some := list(islice(rows, _TEXTS_AT_ONCE)):
            for example, (inputs_ids, targets_ids) in zip(
                some, _ids(task, some, words), strict=True
            ):
                line = {
                    "inputs": example["inputs"],
                    "targets": example["targets"],
                    "inputs_ids": inputs_ids,
                    "targets_ids": targets_ids,
                }
                # In ASCII, because some readers take U+2028 for the end of a line.
                file.write(json.dumps(line) + "\n")
            number += len(some)
    return number


def _vocabulary(model: str, vocabulary: str) -> AnyVocabulary:
    if vocabulary:
        return load_vocabulary(vocabulary)
    from prompt_tuning_jax.checkpoints.load import load_model
    from prompt_tuning_jax.inference.setup import vocabulary_of

    return vocabulary_of(load_model(model))


def _ids(
    task: Task, batch: Sequence[Example], words: AnyVocabulary
) -> list[tuple[list[int], list[int]]]:
    inputs = encode_inputs(words, [example["inputs"] for example in batch], index=task.index)
    targets = words.encode_targets([example["targets"] for example in batch])
    return list(zip(inputs, targets, strict=True))


def _is_later(task: T5Task, base: Mapping[str, T5Task]) -> bool:
    """Returns whether an earlier version of the same task is listed instead."""
    return task.name.endswith("_v200") and task.name.replace("_v200", "_v002") in base


def _heading(title: str, group: Sequence[T5Task], base: Mapping[str, T5Task]) -> str:
    forms = [form for form in FORMS[1:] if any(form in forms_of(task) for task in group)]
    also = [f"also with {_prefixes(forms)}"]
    if any(task.name.replace("_v002", "_v200") in base for task in group if "_v002" in task.name):
        also.append("_v200 for TFDS 2.0.0")
    return f"{title} ({', '.join(also)})"


def _prefixes(forms: Sequence[str]) -> str:
    return " or ".join(f"{form}_" for form in forms)


def _with_sizes(task: T5Task, data_dir: str) -> str:
    if not data_dir:
        return ""
    sizes = []
    for split in task.splits:
        try:
            number = number_of_rows(task, split, data_dir)
        except UserError as error:
            sizes.append(f"{split}: {error}")
            continue
        if number is not None:
            sizes.append(f"{split} {number:,}")
    return f"{', '.join(sizes) or 'no data'}: "
