"""Converts rows to text as in the T5 paper (Raffel et al. 2020, appendix D).

Numbers and names follow ``t5.data.preprocessors`` 0.9.4, which the 2021 code called.
"""

import re
import string
from collections.abc import Sequence

import numpy as np

from prompt_tuning_jax.data.tasks.task import Example, Preprocess, Row
from prompt_tuning_jax.errors import UserError

# The target of an example without a label.
UNLABELED = "<unk>"
_NO_LABEL = -1


def labeled_text(
    row: Row, *, task_word: str, fields: Sequence[str], labels: Sequence[str]
) -> list[Example]:
    """{fields, label, idx} -> "task_word field1: text1 field2: text2" and the label's name.

    Args:
      row: label is an index into ``labels``, or -1 (or absent) for "<unk>".
      task_word: the first word of the inputs.
      fields: in their order in the text.
      labels: by class id.

    Returns:
      One example, with the row's ``idx``.  UserError for a label that is not a class id.
    """
    named = [f"{field}: {row[field]}" for field in fields]
    example: Example = {
        "inputs": " ".join([task_word, *named]),
        "targets": label_name(row, labels=labels),
    }
    if "idx" in row:
        example["idx"] = plain(row["idx"])
    return [example]


def stsb(row: Row) -> list[Example]:
    """{sentence1, sentence2, label, idx} -> inputs and the similarity in steps of 0.2, "3.4".

    The label is rounded in float32, with halves to the even step: both 0.3 and 0.5 give "0.4".
    Rows without a label have -1 and give "-1.0".
    """
    (example,) = labeled_text(
        {**row, "label": _NO_LABEL},
        task_word="stsb",
        fields=("sentence1", "sentence2"),
        labels=(),
    )
    steps = np.round(np.float32(row.get("label", _NO_LABEL)) * np.float32(5))
    example["targets"] = f"{steps / np.float32(5):.1f}"
    return [example]


def label_name(row: Row, *, labels: Sequence[str]) -> str:
    """Returns the name of the row's label; "<unk>" if it has none."""
    label = int(row.get("label", _NO_LABEL))
    if label == _NO_LABEL:
        return UNLABELED
    if not 0 <= label < len(labels):
        raise UserError(
            f"row {row.get('idx', '')}: label {label} is neither from 0 to {len(labels) - 1} "
            f"({', '.join(labels)}) nor -1 (no label)"
        )
    return labels[label]


def has_label(example: Example) -> bool:
    """Returns whether an example can be scored: test splits have no labels."""
    if example.get("label") == _NO_LABEL:  # WSC, whose target is the referent even without a label
        return False
    return example["targets"] not in (UNLABELED, f"{_NO_LABEL:.1f}")


def plain(number: object) -> object:
    """Converts NumPy numbers to Python's; other values are unchanged.  Examples are JSON values."""
    return number.item() if isinstance(number, np.generic) else number


_BOLD = re.compile("</?b>")
# ReCoRD's passages end in highlights, each preceded by this line.
_HIGHLIGHT_AFTER_STOP = re.compile(r"""([.?!"'])\n@highlight\n""")
_HIGHLIGHT = "\n@highlight\n"


def axb(row: Row, *, labels: Sequence[str]) -> list[Example]:
    """{sentence1, sentence2, label, idx} -> the text of RTE, with sentence1 as premise."""
    renamed = {**row, "premise": row["sentence1"], "hypothesis": row["sentence2"]}
    return labeled_text(renamed, task_word="rte", fields=("hypothesis", "premise"), labels=labels)


def multirc(row: Row, *, labels: Sequence[str]) -> list[Example]:
    """Converts one answer to one question to one example, and removes the paragraph's HTML.

    Args:
      row: question, answer, paragraph, label, and idx: {paragraph, question, answer}.
      labels: by class id.

    Returns:
      One example; ``idx/question`` groups the answers that are scored together.
    """
    text = (
        f"multirc question: {row['question']} answer: {row['answer']} paragraph: {row['paragraph']}"
    )
    example: Example = {
        "inputs": _BOLD.sub("", text.replace("<br>", " ")),
        "targets": label_name({**row, "idx": _index(row)}, labels=labels),
    }
    for part in ("paragraph", "question", "answer"):
        example[f"idx/{part}"] = plain(row["idx"][part])
    return [example]


def _index(row: Row) -> str:
    return "/".join(str(row["idx"][part]) for part in ("paragraph", "question", "answer"))


def record(row: Row) -> list[Example]:
    """Converts one gap in a passage to one example per answer; each has the list of all answers.

    Args:
      row: query, passage, entities, answers (none in test splits), and idx: {passage, query}.

    Returns:
      One example per answer; without answers, one example with the target "<unk>".
    """
    passage = _HIGHLIGHT_AFTER_STOP.sub(r"\1 ", row["passage"]).replace(_HIGHLIGHT, ". ")
    entities = ", ".join(row["entities"])
    answers = [str(answer) for answer in row["answers"]]
    shared = {
        "inputs": f"record query: {row['query']} entities: {entities} passage: {passage}",
        "idx/passage": plain(row["idx"]["passage"]),
        "idx/query": plain(row["idx"]["query"]),
    }
    return [
        {**shared, "targets": target, "answers": list(answers)} for target in answers or [UNLABELED]
    ]


_WORD = "wsc:"
_WHITE = r"\t\n\f\r "  # white space in RE2, which the original uses

# Two texts whose span2_index misses the pronoun -> the same texts with X in its place.
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
    """Marks the pronoun with asterisks; the target is span1, even if it is not the referent.

    Args:
      row: text, span1_text, span2_text (the pronoun), span2_index (its index among the words, which
        are separated by single blanks), label (1: span1 is the referent) and idx.

    Returns:
      One example with ``label`` and ``idx``.  UserError if span2_index is not that of the pronoun.
    """
    # Like the original, this also replaces any other separate X in the text.
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
    """``wsc_simple`` for rows whose span1 is the referent, as in training; other rows give none."""
    return wsc_simple(row) if int(row.get("label", 0)) else []


def wsc_marked(row: Row, *, labels: Sequence[str]) -> list[Example]:
    """Returns WSC as a classification of two marked spans, "* span1 * ... # span2 #".

    A span that is not at its index, in words with one white space after each, stays unmarked.
    """
    text = _mark(row["text"], span=row["span1_text"], index=int(row["span1_index"]), mark="*")
    # The marks of the first span count as words.
    moved = 2 * (row["span1_index"] < row["span2_index"])
    text = _mark(text, span=row["span2_text"], index=int(row["span2_index"]) + moved, mark="#")
    return labeled_text({**row, "text": text}, task_word="wsc", fields=("text",), labels=labels)


def dpr_simple(row: Row) -> list[Example]:
    """{sentence, pronoun, candidates, label} -> the text of ``wsc_simple``.

    Marks the first occurrence of the pronoun as a word before a blank, full stop or comma.
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
        shown = repr(words[index]) if 0 < index < len(words) else "not within the text"
        raise UserError(
            f"WSC row {row['idx']}: span2_index {index} is {shown} and must be the place of "
            f"{row['span2_text']!r} among the words, counted from 0, and not the first"
        )
    # If the pronoun is the last word, the blank after it remains.
    return " ".join([*words[:index], "X", " ".join(words[index + 1 :])])


def _mark(text: str, *, span: str, index: int, mark: str) -> str:
    pattern = rf"((?:[^{_WHITE}]+[{_WHITE}]){{{index}}})({re.escape(span)})"
    match = re.match(pattern, text)
    return f"{match[1]}{mark} {match[2]} {mark}{text[match.end() :]}" if match else text


_PUNCTUATION = re.compile(f"([{re.escape(string.punctuation)}])")
# RE2's white space, as in the original: not Unicode's other characters, nor vertical tab.
_WHITE_SPACE = re.compile("[\t\n\f\r ]+")


def squad(row: Row) -> list[Example]:
    """{question, context, answers: {text: [...]}, id} -> "question: ... context: ...".

    Returns: One example whose target is the first answer ("<unk>" if there is none), with
    ``answers``, ``id``, ``question`` and ``context``, all of them processed by ``spaced``.
    """
    return [{**_example(row, answers=row["answers"]["text"]), "id": row["id"]}]


def mrqa(row: Row) -> list[Example]:
    """{question, context, answers: [...], qid} -> as ``squad``, with ``idx`` instead of ``id``."""
    return [{**_example(row, answers=row["answers"]), "idx": row["qid"]}]


def spaced(text: str) -> str:
    """Puts blanks around ASCII punctuation, and merges white space.

    >>> spaced("It's  5.")
    "It ' s 5 . "
    """
    return collapsed(_PUNCTUATION.sub(r" \1 ", text))


def _example(row: Row, *, answers: Sequence[str]) -> Example:
    question, context = spaced(row["question"]), spaced(row["context"])
    spaced_answers = [spaced(answer) for answer in answers]
    return {
        "inputs": collapsed(f"question: {question} context: {context}"),
        "targets": spaced_answers[0] if spaced_answers else UNLABELED,
        "question": question,
        "context": context,
        "answers": spaced_answers,
    }


def collapsed(text: str) -> str:
    """Merges white space into single blanks."""
    return _WHITE_SPACE.sub(" ", text)


def with_task_word(row: Row, *, preprocess: Preprocess, task_word: str) -> list[Example]:
    """Returns the examples of another preprocessor with a word before their inputs."""
    return [{**e, "inputs": f"{task_word} {e['inputs']}"} for e in preprocess(row)]


def summarize(row: Row, *, article: str, summary: str) -> list[Example]:
    """Returns "summarize: ..." and the summary, from the named fields of the row."""
    return [{"inputs": f"summarize: {row[article]}", "targets": row[summary]}]
