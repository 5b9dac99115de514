"""Pronouns and what they refer to: SuperGLUE's WSC in two forms, and DPR in WSC's."""

import re
from collections.abc import Sequence

from prompt_tuning_jax.data.tasks.t5_tasks.glue import labelled_text, plain
from prompt_tuning_jax.data.tasks.task import Example, Row
from prompt_tuning_jax.errors import UserError

_WORD = "wsc:"
_WHITE = r"\t\n\f\r "  # what ends a word for RE2, which the original uses

# Two texts whose span2_index points beside the pronoun, with the place of it.
_MISNUMBERED = {
    (
        "The boy continued to whip the pony , and eventually the pony threw him over. "
        'John laughed out quite loud. "Good for him," he said. '
    ): (
        "The boy continued to whip the pony , and eventually the pony threw him over. "
        'John laughed out quite loud. "Good for X ," he said.'
    ),
    (
        "When they had eventually calmed down a bit , and had gotten home, Mr. Farley put the "
        "magic pebble in an iron safe . Some day they might want to use it , but really for now, "
        "what more could they wish for?"
    ): (
        "When they had eventually calmed down a bit , and had gotten home, Mr. Farley put the "
        "magic pebble in an iron safe . Some day they might want to use X , but really for now, "
        "what more could they wish for?"
    ),
}


def wsc_simple(row: Row) -> list[Example]:
    """Inputs with the pronoun in asterisks; the target is span1, right referent or not.

    Args:
      row: text, span1_text, span2_text (the pronoun), span2_index (its number among the words,
        which single blanks separate), label (1: span1 is the referent) and idx.

    Returns:
      One example with ``label`` and ``idx``.  UserError where span2_index is not the pronoun's.
    """
    # As the original does it, which reads a lone X in the text as the pronoun, too.
    text = _with_gap(row).replace(" X ", f" *{row['span2_text']}* ")
    return [
        {
            "inputs": f"{_WORD} {text}",
            "targets": row["span1_text"],
            "label": int(row.get("label", 0)),
            "idx": plain(row["idx"]),
        }
    ]


def wsc_simple_positives(row: Row) -> list[Example]:
    """``wsc_simple`` of the rows whose span1 is the referent: what a model is trained on."""
    return wsc_simple(row) if int(row.get("label", 0)) else []


def wsc_marked(row: Row, *, labels: Sequence[str]) -> list[Example]:
    """WSC as a classification of two marked spans, "* span1 * ... # span2 #".

    A span that is not at its index, counted in words with one white space after each, stays
    unmarked.
    """
    text = _mark(row["text"], span=row["span1_text"], index=int(row["span1_index"]), mark="*")
    # The first span's marks count as words.
    moved = 2 * (row["span1_index"] < row["span2_index"])
    text = _mark(text, span=row["span2_text"], index=int(row["span2_index"]) + moved, mark="#")
    return labelled_text({**row, "text": text}, task_word="wsc", fields=("text",), labels=labels)


def dpr_simple(row: Row) -> list[Example]:
    """{sentence, pronoun, candidates, label} -> the text of ``wsc_simple``.

    The first place of the pronoun, as a word before a blank, full stop or comma, is marked.
    """
    pattern = rf" ({re.escape(row['pronoun'])})( |\.|,)"
    text = re.sub(pattern, r" *\1*\2", row["sentence"], count=1)
    return [{"inputs": f"{_WORD} {text}", "targets": row["candidates"][int(row["label"])]}]


def _with_gap(row: Row) -> str:
    if row["text"] in _MISNUMBERED:
        return _MISNUMBERED[row["text"]]
    words = row["text"].split(" ")
    index = int(row["span2_index"])
    if not 0 < index < len(words) or words[index] != row["span2_text"]:
        found = repr(words[index]) if 0 < index < len(words) else "not within the text"
        raise UserError(
            f"WSC row {row['idx']}: span2_index {index} is {found} and must be the place of "
            f"{row['span2_text']!r} among the words, counted from 0, and not the first"
        )
    # Nothing after a pronoun at the end, but the blank stays.
    return " ".join([*words[:index], "X", " ".join(words[index + 1 :])])


def _mark(text: str, *, span: str, index: int, mark: str) -> str:
    pattern = rf"((?:[^{_WHITE}]+[{_WHITE}]){{{index}}})({re.escape(span)})"
    match = re.match(pattern, text)
    return f"{match[1]}{mark} {match[2]} {mark}{text[match.end() :]}" if match else text
