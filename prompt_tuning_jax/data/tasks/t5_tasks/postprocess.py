"""Texts as the values that the metrics compare: (text, example, is_target) -> value.

A text that is not a label becomes -1, which no metric counts as right.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from prompt_tuning_jax.data.tasks.task import Example, Postprocess

INVALID = -1

_SENTINEL = "<extra_id_0>"
# Words that do not tell two referents apart.
_ARTICLES = ("a", "an", "the")
_POSSESSIVES = ("her", "his", "my", "our", "their", "whose", "your")
_POINTERS = ("that", "these", "this", "those", "which")
_QUANTIFIERS = ("each", "every", "few", "many", "much", "some")
_DETERMINERS = frozenset((*_ARTICLES, *_POSSESSIVES, *_POINTERS, *_QUANTIFIERS))


def class_id(text: str, example: Example, is_target: bool, *, labels: Sequence[str]) -> int:
    """The number of the label that the text is to the letter, blanks included; otherwise -1."""
    del example, is_target
    return labels.index(text) if text in labels else INVALID


def number(text: str, example: Example, is_target: bool) -> float:
    """The text as a number; -1 where it is none, or not a finite one."""
    del example, is_target
    try:
        value = float(text)
    except ValueError:
        return float(INVALID)
    # The original keeps nan and inf, of which one makes the whole split's correlation nan.
    return value if math.isfinite(value) else float(INVALID)


def multirc_answer(
    text: str, example: Example, is_target: bool, *, labels: Sequence[str]
) -> dict[str, Any]:
    """{"value": class id}, for targets with "group": the question that is answered."""
    result: dict[str, Any] = {"value": class_id(text, example, is_target, labels=labels)}
    if is_target:
        result["group"] = example["idx/question"]
    return result


def record_answers(text: str, example: Example, is_target: bool) -> dict[str, Any]:
    """{"value": text}, for targets {"value": all answers, "group": (passage, query)}."""
    if not is_target:
        return {"value": text}
    group = (example["idx/passage"], example["idx/query"])
    return {"value": example["answers"], "group": group}


def question_answers(text: str, example: Example, is_target: bool) -> Any:
    """All answers of the example for targets, the text as it is for predictions."""
    return example["answers"] if is_target else text


def wsc_referent(text: str, example: Example, is_target: bool) -> int:
    """Whether the prediction names the example's span (1 or 0); the label for targets.

    Case and determiners do not count, and the words of one may be some of the other's.  A
    possessive names something else than its owner.  -1 where nothing but determiners is left.
    """
    if is_target:
        return int(example["label"])
    predicted, referent = _bare(text), _bare(example["targets"])
    if not predicted:
        return INVALID
    if ("'" in predicted) != ("'" in referent):
        return 0
    predicted_words, referent_words = set(predicted.split(" ")), set(referent.split(" "))
    return int(predicted_words <= referent_words or referent_words <= predicted_words)


def without_sentinel(text: str) -> str:
    """Drop a leading ``<extra_id_0>`` and the blanks at the start.

    Models that were not adapted to language modelling open their answers with it.
    """
    return text.removeprefix(_SENTINEL).lstrip()


def _bare(text: str) -> str:
    words = text.strip().lower().split(" ")
    return " ".join(word for word in words if word not in _DETERMINERS)


# MRPC's labels in the words of QQP.
EQUIVALENT_TO_DUPLICATE: Mapping[str, str] = {"equivalent": "duplicate"}
DUPLICATE_TO_EQUIVALENT: Mapping[str, str] = {"duplicate": "equivalent"}


def translate(text: str, words: Mapping[str, str]) -> str:
    """Replace each word wherever it occurs, within others too, in the order of ``words``.

    >>> translate("not_duplicate", DUPLICATE_TO_EQUIVALENT)
    'not_equivalent'
    """
    for old, new in words.items():
        text = text.replace(old, new)
    return text


def translated(postprocess: Postprocess, words: Mapping[str, str]) -> Postprocess:
    """The same postprocessor behind a translation of targets and predictions.

    A prediction in the words of the task that is scored passes as it is.
    """
    return partial(_translated, postprocess=postprocess, words=words)


def _translated(
    text: str,
    example: Example,
    is_target: bool,
    *,
    postprocess: Postprocess,
    words: Mapping[str, str],
) -> Any:
    return postprocess(translate(text, words), example, is_target)
