"""Questions about a passage as text: SQuAD, and the data sets of MRQA in the same form."""

import re
import string
from collections.abc import Sequence

from prompt_tuning_jax.data.tasks.t5_tasks.glue import UNLABELLED
from prompt_tuning_jax.data.tasks.task import Example, Row

_PUNCTUATION = re.compile(f"([{re.escape(string.punctuation)}])")
# Those of RE2, which the original uses: no others of Unicode, and no vertical tab.
_WHITE_SPACE = re.compile("[\t\n\f\r ]+")


def squad(row: Row) -> list[Example]:
    """{question, context, answers: {text: [...]}, id} -> "question: ... context: ...".

    Returns:
      One example whose target is the first answer ("<unk>" where there is none), with ``answers``,
      ``id``, ``question`` and ``context``, all spaced out by ``spaced``.
    """
    return [{**_example(row, answers=row["answers"]["text"]), "id": row["id"]}]


def mrqa(row: Row) -> list[Example]:
    """{question, context, answers: [...], qid} -> as ``squad``, with ``idx`` for its ``id``."""
    return [{**_example(row, answers=row["answers"]), "idx": row["qid"]}]


def spaced(text: str) -> str:
    """A blank on each side of every ASCII punctuation mark, and no two white spaces together.

    >>> spaced("It's  5.")
    "It ' s 5 . "
    """
    return _collapsed(_PUNCTUATION.sub(r" \1 ", text))


def _example(row: Row, *, answers: Sequence[str]) -> Example:
    question, context = spaced(row["question"]), spaced(row["context"])
    spaced_answers = [spaced(answer) for answer in answers]
    return {
        "inputs": _collapsed(f"question: {question} context: {context}"),
        "targets": spaced_answers[0] if spaced_answers else UNLABELLED,
        "question": question,
        "context": context,
        "answers": spaced_answers,
    }


def _collapsed(text: str) -> str:
    return _WHITE_SPACE.sub(" ", text)
