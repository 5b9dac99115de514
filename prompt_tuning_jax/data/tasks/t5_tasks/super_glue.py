"""The SuperGLUE rows that ``glue.labelled_text`` alone does not turn into text."""

import re
from collections.abc import Sequence

from prompt_tuning_jax.data.tasks.t5_tasks.glue import UNLABELLED, label_name, labelled_text, plain
from prompt_tuning_jax.data.tasks.task import Example, Row

_BOLD = re.compile("</?b>")
# ReCoRD's passages end in highlights, one after each such line.
_HIGHLIGHT_AFTER_STOP = re.compile(r"""([.?!"'])\n@highlight\n""")
_HIGHLIGHT = "\n@highlight\n"


def axb(row: Row, *, labels: Sequence[str]) -> list[Example]:
    """{sentence1, sentence2, label, idx} -> the text of RTE, sentence1 its premise."""
    renamed = {**row, "premise": row["sentence1"], "hypothesis": row["sentence2"]}
    return labelled_text(renamed, task_word="rte", fields=("hypothesis", "premise"), labels=labels)


def multirc(row: Row, *, labels: Sequence[str]) -> list[Example]:
    """One answer to one question -> one example, with the HTML of the paragraphs removed.

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
    """One gap in one passage -> one example for each answer, all with the list of answers.

    Args:
      row: query, passage, entities, answers (none in test splits), and idx: {passage, query}.

    Returns:
      As many examples as answers; one with the target "<unk>" where there is none.
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
        {**shared, "targets": target, "answers": list(answers)}
        for target in answers or [UNLABELLED]
    ]
