"""GLUE rows as text, as the T5 paper writes them (Raffel et al. 2020, appendix D).

Numbers and names follow ``t5.data.preprocessors`` 0.9.4, which the 2021 code called.
"""

from collections.abc import Sequence

import numpy as np

from prompt_tuning_jax.data.tasks.task import Example, Row
from prompt_tuning_jax.errors import UserError

# What an example without a label has for a target.
UNLABELLED = "<unk>"
_NO_LABEL = -1


def labelled_text(
    row: Row, *, task_word: str, fields: Sequence[str], labels: Sequence[str]
) -> list[Example]:
    """{fields, label, idx} -> "task_word field1: text1 field2: text2" and the label's name.

    Args:
      row: label is an index into ``labels``, or -1 (or absent) for "<unk>".
      task_word: opens the inputs.
      fields: in the order in which the text names them.
      labels: by class id.

    Returns:
      One example, with the row's ``idx``.  UserError for a label that is no class id.
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

    The label is rounded in 32 bits with halves to the even step: 0.3 gives "0.4", 0.5 as well.
    Rows without label have -1 and get "-1.0".
    """
    (example,) = labelled_text(
        {**row, "label": _NO_LABEL},
        task_word="stsb",
        fields=("sentence1", "sentence2"),
        labels=(),
    )
    steps = np.round(np.float32(row.get("label", _NO_LABEL)) * np.float32(5))
    example["targets"] = f"{steps / np.float32(5):.1f}"
    return [example]


def label_name(row: Row, *, labels: Sequence[str]) -> str:
    """The name of the row's label; "<unk>" where it has none."""
    label = int(row.get("label", _NO_LABEL))
    if label == _NO_LABEL:
        return UNLABELLED
    if not 0 <= label < len(labels):
        raise UserError(
            f"row {row.get('idx', '')}: label {label} is none of 0 to {len(labels) - 1} "
            f"({', '.join(labels)}), nor -1 for none"
        )
    return labels[label]


def has_label(example: Example) -> bool:
    """Whether an example can be scored: test splits come without labels."""
    if example.get("label") == _NO_LABEL:  # WSC, whose target is the referent all the same
        return False
    return example["targets"] not in (UNLABELLED, f"{_NO_LABEL:.1f}")


def plain(number: object) -> object:
    """A number of numpy as Python's, anything else as it is: examples hold JSON values."""
    return number.item() if isinstance(number, np.generic) else number
