"""Text with column names in braces, filled in without str.format.

``str.format`` would let a template reach attributes and items of the values
(``{x.__class__}``); here a pair of braces can only name a column.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from prompt_tuning_jax.errors import UserError

# A doubled brace stands for itself; a lone brace that opens or closes nothing is an error.
_PIECE = re.compile(r"(?P<escaped>\{\{|\}\})|\{(?P<column>[^{}]*)\}|(?P<stray>[{}])")


@dataclass(frozen=True, kw_only=True)
class TextTemplate:
    """A parsed template: literal pieces and column names in turn, beginning with a literal.

    >>> parse_template("{a} or {{b}}", field="data.inputs_template").render({"a": "1"})
    '1 or {b}'
    """

    literals: tuple[str, ...]
    columns: tuple[str, ...]

    def render(self, row: Mapping[str, str]) -> str:
        """Puts the row's values in place of the column names; raises KeyError for a missing one."""
        text = self.literals[0]
        for column, literal in zip(self.columns, self.literals[1:], strict=True):
            text += row[column] + literal
        return text


def parse_template(template: str, *, field: str) -> TextTemplate:
    """Parses ``"premise: {premise} hypothesis: {hypothesis}"``.

    Raises UserError, naming ``field``, for unbalanced or empty braces and for a template that
    names no column (every example would be the same text).
    """
    literals, columns, start = [""], [], 0
    for match in _PIECE.finditer(template):
        literals[-1] += template[start : match.start()]
        start = match.end()
        if match["stray"]:
            raise UserError(
                f"{field}: the brace at character {match.start() + 1} of {template!r} has no "
                "partner; write {{ or }} for a brace that is text"
            )
        if match["escaped"]:
            literals[-1] += match["escaped"][0]
        elif match["column"].strip():
            columns.append(match["column"].strip())
            literals.append("")
        else:
            raise UserError(f"{field}: empty braces in {template!r}; write a column name in them")
    literals[-1] += template[start:]
    if not columns:
        raise UserError(f"{field}: {template!r} names no column; write its name in braces")
    return TextTemplate(literals=tuple(literals), columns=tuple(columns))


def column_template(column: str) -> TextTemplate:
    """Returns the template that is the value of one column."""
    return TextTemplate(literals=("", ""), columns=(column,))
