"""Makes the inputs of a model from texts, from rows and from the rows of a data file."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from prompt_tuning_jax.config.experiment import Data
from prompt_tuning_jax.data.tasks.row_files import RowFile, value_text
from prompt_tuning_jax.data.tasks.wording import Given, Wording
from prompt_tuning_jax.errors import UserError, suggest


def model_inputs(
    inputs: Given | Path | Iterable[Given], data: Data, wording: Wording, *, raw: bool
) -> tuple[list[str], list[Mapping[str, Any] | None]]:
    """Returns the model's inputs, and the row that each was made from (None for a text).

    ``raw`` means that ``wording`` changes nothing.  Raises UserError that names the row.
    """
    texts: list[str] = []
    rows: list[Mapping[str, Any] | None] = []
    for place, one in _with_places(inputs, data):
        try:
            if isinstance(one, str):
                texts.append(wording.apply(one))
                rows.append(None)
                continue
            texts.append(_row_input(one, data, wording, raw=raw))
            rows.append(one)
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
    if not texts:
        empty = f"{inputs}: holds no rows" if isinstance(inputs, Path) else "there are no inputs"
        raise UserError(empty)
    return texts, rows


def _with_places(inputs: Given | Path | Iterable[Given], data: Data) -> Iterator[tuple[str, Given]]:
    """Yields each input with its place, for messages."""
    if isinstance(inputs, Path):
        yield from RowFile(
            path=inputs,
            header=data.header,
            columns=data.columns,
            separator=data.separator,
            split=data.eval_split,
        ).rows()
        return
    if isinstance(inputs, str | Mapping):
        inputs = [cast(Given, inputs)]
    if not isinstance(inputs, Iterable):
        raise UserError(f"inputs must be texts or objects, not {type(inputs).__name__}")
    for number, one in enumerate(inputs):
        given: object = one  # callers may not type-check
        if not isinstance(given, str | Mapping):
            shown = repr(given)[:40]
            raise UserError(f"inputs[{number}] must be a text or an object, not {shown}")
        yield f"inputs[{number}]", given


def _row_input(row: Mapping[str, Any], data: Data, wording: Wording, *, raw: bool) -> str:
    """Returns a row's input, from the wording's columns or from ``data.inputs_column``."""
    columns = wording.columns
    column = data.inputs_column
    if columns and wording.from_text is None and all(one in row for one in columns):
        return wording.apply(row)
    if len(columns) > 1:
        return wording.apply(row)  # raises UserError that names the missing column
    if column in row:
        return wording.apply(value_text(row[column], column))
    if columns and all(one in row for one in columns):
        return wording.apply(row)
    wanted = columns[0] if columns and wording.from_text is None else column
    names = [str(name)[:40] for name in row]
    raise UserError(
        f"no column {wanted!r}: {suggest(wanted, names)}; say which one with "
        f"--set data.inputs_column=NAME{'' if not raw else ' (raw reads one column as it is)'}"
    )
