"""Converts texts to the values that metrics compare: (text, example, is_target) -> value.

A text that is not a label becomes -1, which no metric counts as correct.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from prompt_tuning_jax.data.tasks.task import Example, Postprocess

INVALID = -1

_SENTINEL = "<extra_id_0>"
# Words that do not distinguish referents.
_ARTICLES = ("a", "an", "the")
_POSSESSIVES = ("her", "his", "my", "our", "their", "whose", "your")
_POINTERS = ("that", "these", "this", "those", "which")
_QUANTIFIERS = ("each", "every", "few", "many", "much", "some")
_DETERMINERS = frozenset((*_ARTICLES, *_POSSESSIVES, *_POINTERS, *_QUANTIFIERS))


def class_id(text: str, example: Example, is_target: bool, *, labels: Sequence[str]) -> int:
    """Returns the class id of the label that equals the text exactly, blanks included, or -1."""
    del example, is_target
    return labels.index(text) if text in labels else INVALID


def number(text: str, example: Example, is_target: bool) -> float:
    """Returns the text as a number; -1 if it is not a finite number."""
    del example, is_target
    try:
        value = float(text)
    except ValueError:
        return float(INVALID)
    # The original keeps nan and inf, and a single one makes the correlation of the split nan.
    return value if math.isfinite(value) else float(INVALID)


def multirc_answer(
    text: str, example: Example, is_target: bool, *, labels: Sequence[str]
) -> dict[str, Any]:
    """Returns {"value": class id}, and for targets also "group", the id of the question."""
    result: dict[str, Any] = {"value": class_id(text, example, is_target, labels=labels)}
    if is_target:
        result["group"] = example["idx/question"]
    return result


def record_answers(text: str, example: Example, is_target: bool) -> dict[str, Any]:
    """Returns {"value": text}; for targets {"value": all answers, "group": (passage, query)}."""
    if not is_target:
        return {"value": text}
    group = (example["idx/passage"], example["idx/query"])
    return {"value": example["answers"], "group": group}


def question_answers(text: str, example: Example, is_target: bool) -> Any:
    """Returns all answers of the example for targets, and the unchanged text for predictions."""
    return example["answers"] if is_target else text


def wsc_referent(text: str, example: Example, is_target: bool) -> int:
    """Returns 1 if the prediction names the example's span, otherwise 0; for targets, the label.

    Case and determiners are ignored, and the words of either may be a subset of the other's.  A
    possessive never matches its owner.  The result is -1 if the prediction has only determiners.
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
    """Removes a leading ``<extra_id_0>`` and the blanks at the start.

    Models without LM adaptation begin their answers with it.
    """
    return text.removeprefix(_SENTINEL).lstrip()


def _bare(text: str) -> str:
    words = text.strip().lower().split(" ")
    return " ".join(word for word in words if word not in _DETERMINERS)


# MRPC's labels in the words of QQP.
EQUIVALENT_TO_DUPLICATE: Mapping[str, str] = {"equivalent": "duplicate"}
DUPLICATE_TO_EQUIVALENT: Mapping[str, str] = {"duplicate": "equivalent"}


def translate(text: str, words: Mapping[str, str]) -> str:
    """Replaces each word wherever it occurs, also within other words, in the order of ``words``.

    >>> translate("not_duplicate", DUPLICATE_TO_EQUIVALENT)
    'not_equivalent'
    """
    for old, new in words.items():
        text = text.replace(old, new)
    return text


def translated(postprocess: Postprocess, words: Mapping[str, str]) -> Postprocess:
    """Returns the postprocessor preceded by a translation of targets and predictions.

    Predictions in the words of the evaluated task are unchanged.
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
