"""Reads SQuAD, MRQA, pronoun resolution and summaries from files, as rows of TensorFlow Datasets.

The conversions are TFDS's.  SQuAD's questions with the same id become one row with all their
answers (``question_answering/qa_utils.py``).  MRQA's texts are stripped, but not its answers;
tokens and the positions of answers are left out (``text/mrqa/mrqa.py``).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prompt_tuning_jax.data.tasks.t5_tasks.official_lines import (
    field,
    json_file,
    json_lines,
    text_lines,
)
from prompt_tuning_jax.data.tasks.task import Row
from prompt_tuning_jax.errors import UserError, suggest


def squad_rows(path: Path) -> Iterator[Row]:
    """Yields the rows of a SQuAD 1.1 file.

    Fields are ``id, title, context, question, answers: {text, answer_start}``.
    """
    rows: dict[str, dict[str, Any]] = {}
    for a, article in enumerate(field(json_file(path), "data", list, str(path))):
        for p, paragraph in enumerate(field(article, "paragraphs", list, f"{path}: article {a}")):
            where = f"{path}: article {a}, paragraph {p}"
            context = field(paragraph, "context", str, where)
            for question in field(paragraph, "qas", list, where):
                name = field(question, "id", str, where)
                # Test files may lack answers.
                answers = field(question, "answers", list, where) if "answers" in question else []
                row = rows.setdefault(
                    name,
                    {
                        "id": name,
                        "title": article.get("title", ""),
                        "context": context,
                        "question": field(question, "question", str, where),
                        "answers": {"text": [], "answer_start": []},
                    },
                )
                for answer in answers:
                    row["answers"]["text"].append(field(answer, "text", str, where))
                    start = field(answer, "answer_start", int, where)
                    row["answers"]["answer_start"].append(start)
    yield from rows.values()


def mrqa_rows(path: Path) -> Iterator[Row]:
    """Yields ``subset, context, qid, question, answers`` of an MRQA file, after its header line."""
    subset = ""
    for number, raw in json_lines(path):
        where = f"{path}:{number}"
        if not subset:
            header = field(raw, "header", dict, where)
            subset = field(header, "dataset", str, where)
            continue
        context = field(raw, "context", str, where).strip()
        for question in field(raw, "qas", list, where):
            answers = field(question, "answers", list, where) if "answers" in question else []
            for answer in answers:
                if not isinstance(answer, str):
                    raise UserError(f"{where}: an answer is {answer!r}, and a text is needed")
            yield {
                "subset": subset,
                "context": context,
                "qid": field(question, "qid", str, where),
                "question": field(question, "question", str, where).strip(),
                "answers": list(answers),
            }


def dpr_rows(path: Path) -> Iterator[Row]:
    """Yields ``sentence, pronoun, candidates, label``: four lines each, with blank ones between."""
    lines = [(number, line.strip()) for number, line in text_lines(path) if line.strip()]
    for at in range(0, len(lines), 4):
        group = [text for _, text in lines[at : at + 4]]
        where = f"{path}:{lines[at][0]}"
        if len(group) < 4:
            raise UserError(
                f"{where}: sentence, pronoun, candidates and answer take four lines, and here the "
                "file ends; is it cut off?"
            )
        candidates = [candidate.strip() for candidate in group[2].split(",")]
        if len(candidates) != 2 or group[3] not in candidates:
            raise UserError(f"{where}: the answer is {group[3]!r}: {suggest(group[3], candidates)}")
        yield {
            "sentence": group[0],
            "pronoun": group[1],
            "candidates": candidates,
            "label": candidates.index(group[3]),
        }


def summary_rows(path: Path, fields: Mapping[str, bool]) -> Iterator[Row]:
    """Yields the named texts of jsonl objects, as written by Hugging Face's datasets.

    ``fields`` maps each name to whether it is required; optional ones default to empty.
    """
    for number, raw in json_lines(path):
        where = f"{path}:{number}"
        yield {
            name: field(raw, name, str, where) if needed or name in raw else ""
            for name, needed in fields.items()
        }
