"""The forms of a task in the 2021 code: ordinary, taskless and with a task index."""

from collections.abc import Sequence
from functools import partial
from typing import Literal, TypeAlias

from prompt_tuning_jax.data.tasks.task import Example, Preprocess, Row

# Their names are the prefixes of the tasks' names; the ordinary form has none.
Form: TypeAlias = Literal["ordinary", "taskless", "task_index"]


def without_task_word(inputs: str) -> str:
    """Drop everything up to the first blank, blank included; without a blank nothing.

    >>> without_task_word("boolq passage: ...")
    'passage: ...'
    """
    before, blank, rest = inputs.partition(" ")
    return rest if blank else before


def preprocess_in_form(
    preprocess: Preprocess, form: Form, *, has_task_word: bool = True, index: int | None = None
) -> Preprocess:
    """A preprocessor of the ordinary form as one of ``form``.

    Args:
      preprocess: of the ordinary form.
      form: "taskless" and "task_index" drop the task word; the latter's examples carry
        ``task_index``, from which the token before the inputs is made (``task_index_id``).
      has_task_word: False keeps the inputs whole in every form.
      index: the task's number; "task_index" needs it, ValueError otherwise.
    """
    if form == "ordinary":
        return preprocess
    if form == "taskless":
        return partial(_taskless, preprocess=preprocess) if has_task_word else preprocess
    if index is None:
        raise ValueError("a task in the task_index form needs an index")
    taskless = preprocess_in_form(preprocess, "taskless", has_task_word=has_task_word)
    return partial(_indexed, preprocess=taskless, index=index)


def task_index_id(vocabulary_size: int, index: int) -> int:
    """The token id that stands for task number ``index``: the last id for 0, then downwards.

    With T5's vocabulary of 32,100 these are ``<extra_id_0>``, ``<extra_id_1>`` and so on.
    """
    return vocabulary_size - (index + 1)


def with_task_index(ids: Sequence[int], *, vocabulary_size: int, index: int) -> list[int]:
    """The inputs' ids behind the one of the task."""
    return [task_index_id(vocabulary_size, index), *ids]


def _taskless(row: Row, *, preprocess: Preprocess) -> list[Example]:
    return [
        {**example, "inputs": without_task_word(example["inputs"])} for example in preprocess(row)
    ]


def _indexed(row: Row, *, preprocess: Preprocess, index: int) -> list[Example]:
    return [{**example, "task_index": index} for example in preprocess(row)]
