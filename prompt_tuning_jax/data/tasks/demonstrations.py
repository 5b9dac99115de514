"""Demonstrations: training examples with their targets in the input text."""

import bisect
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from prompt_tuning_jax.data.batching.tokenize import TokenizedExamples
from prompt_tuning_jax.data.tasks.task import Example, Row, Source, Task, row_is_example
from prompt_tuning_jax.data.vocabularies.vocab import AnyVocabulary

Demonstrations: TypeAlias = tuple[Mapping[str, str], ...]
# (demonstrations, input) -> the text that the model reads.
Compose: TypeAlias = Callable[[Demonstrations, str], str]
# The example's field with the number of demonstrations in its inputs.
NUMBER = "number_of_demonstrations"
# In Unicode's private use area, so that no template contains it.
_MARK = "\ue000"


def draw(
    examples: Sequence[Example], *, labels: Sequence[str], shots: int, balanced: bool, seed: int
) -> Demonstrations:
    """Returns ``shots`` random examples (or all, if there are fewer) with different inputs.

    ``balanced`` draws in rounds of one example per label, shuffled within a round, so that the
    first few are balanced as well; labels without further examples are skipped.  It has no effect
    without ``labels``.
    """
    random = np.random.default_rng(seed)
    shuffled: dict[str, str] = {}
    for index in random.permutation(len(examples)):
        example = examples[int(index)]
        shuffled.setdefault(example["inputs"], example["targets"])
    order = list(shuffled.items())
    if balanced and labels:
        by_label: dict[str, list[str]] = {label: [] for label in labels}
        for inputs, targets in order:
            if targets in by_label:
                by_label[targets].append(inputs)
        order = []
        for number in range(shots):
            having = [label for label, inputs in by_label.items() if len(inputs) > number]
            if not having or len(order) >= shots:
                break
            for index in random.permutation(len(having)):
                label = having[int(index)]
                order.append((by_label[label][number], label))
    return tuple({"inputs": inputs, "targets": targets} for inputs, targets in order[:shots])


def demonstrated(
    task: Task,
    drawn: Demonstrations,
    *,
    compose: Compose,
    identity: str,
    vocabulary: AnyVocabulary,
    inputs_length: int,
    chat: bool = False,
) -> Task:
    """Returns the task with drawn examples in each input, as many as fit.

    An input has at most ``inputs_length`` tokens.

    The first ones are kept; the input itself is truncated only if it is too long without any.  An
    example is never a demonstration for itself.  ``identity`` represents ``compose`` in cache keys.
    """
    beside = int(task.index is not None)  # the task's token

    def with_those_that_fit(inputs: str) -> tuple[str, int]:
        others = tuple(each for each in drawn if each["inputs"] != inputs)

        def length(number: int) -> int:
            text = compose(others[:number], inputs)
            return beside + len(vocabulary.encode_input(text, chat=chat))

        number = len(others)
        if length(number) > inputs_length:
            number = bisect.bisect_right(range(1, number), inputs_length, key=length)
        return compose(others[:number], inputs), number

    def rows(split: str, data_dir: str) -> Iterator[Row]:
        for example in task.load(split, data_dir):
            text, number = with_those_that_fit(example["inputs"])
            yield {**example, "inputs": text, NUMBER: number}

    def fingerprint(split: str, data_dir: str) -> str:
        parts = [task.fingerprint(split, data_dir), identity, inputs_length, chat, drawn]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    source = Source(
        splits=task.splits,
        rows=rows,
        fingerprint=fingerprint,
        note=task.source.note,
        display_names=task.source.display_names,
    )
    _, _, ending = compose((), _MARK).rpartition(_MARK)
    return dataclasses.replace(
        task,
        source=source,
        preprocess=row_is_example,
        inputs_ending=f"{task.inputs_ending}{ending}",
    )


def report(examples: TokenizedExamples, *, shots: int, seed: int) -> str:
    """Returns one line about the number of demonstrations in the inputs."""
    numbers = np.asarray([example[NUMBER] for example in examples.texts])
    line = f"demonstrations of seed {seed}: "
    if numbers.min() == numbers.max():
        return f"{line}{numbers[0]} in every input" + (
            f" ({shots} asked for)" if numbers[0] < shots else ""
        )
    return (
        f"{line}{numbers.mean():.1f} of {shots} fit on average, {numbers.min()} at least; all in "
        f"{100 * (numbers == shots).mean():.1f} % of the inputs"
    )
