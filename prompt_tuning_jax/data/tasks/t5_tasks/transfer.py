"""A prompt of one task tried on another: labels are translated before they are scored."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from prompt_tuning_jax.data.tasks.task import Example, Postprocess

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
