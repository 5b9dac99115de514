"""Turns a user's text into a model's input, with the wording that a prompt was trained with.

A task words a bare text with its ``from_text``; a user's files have ``data.inputs_template``, text
with column names in braces.  The values of those columns are given as one text or, if there are
several, as an object ``{column: value}``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from prompt_tuning_jax.config.text_template import TextTemplate, parse_template
from prompt_tuning_jax.data.tasks.registry import tasks_known_as
from prompt_tuning_jax.data.tasks.row_files import value_text
from prompt_tuning_jax.errors import UserError, suggest

# A bare text, or the values of a template's columns.
Given: TypeAlias = str | Mapping[str, object]

LONGEST_TEMPLATE = 10_000  # characters; files may come from untrusted sources
_TEXT = "text"  # the column of a task that words a bare text
# In Unicode's private use area, so that no text contains it.
_MARK = "\ue000"


@dataclass(frozen=True, kw_only=True)
class Wording:
    """The text around a user's text; none if ``template`` and ``from_text`` are empty.

    Attributes:
      template: column names in braces, as in ``"premise: {premise} hypothesis: {hypothesis}"``.
      from_text: a task's function of a bare text, which ``template`` then only describes.
      chat: whether the result is a message in the chat template of the model's tokenizer.
      index: if not None, a token for this number precedes the input (``Task.index``).
    """

    template: str = ""
    from_text: Callable[[str], str] | None = None
    chat: bool = False
    index: int | None = None

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The distinct columns of the template; empty if inputs are used unchanged."""
        return tuple(dict.fromkeys(self._parsed.columns)) if self._parsed else ()

    @property
    def ending(self) -> str:
        """The text behind the last column."""
        return self._parsed.literals[-1] if self._parsed else ""

    @property
    def shown(self) -> str:
        """The template for display, at most a line long."""
        shown = self.template or "of the task"
        shown = shown if len(shown) <= 100 else f"{shown[:97]}..."
        return f"{shown} as a chat message" if self.chat else shown

    @property
    def key(self) -> object:
        """Equal for wordings with the same result, whatever a single column is called."""
        settings = self.chat, self.index
        if self._parsed is None:
            return settings, self.from_text
        columns = self._parsed.columns
        return settings, self._parsed.literals, columns if len(self.columns) > 1 else len(columns)

    def apply(self, given: Given) -> str:
        """Returns the model's input for a bare text or the values of columns.

        UserError for a bare text if there are several columns, for a missing column, and for a
        value that is not text.
        """
        if isinstance(given, str):
            if self.from_text is not None:
                return self.from_text(given)
            if self._parsed is None:
                return given
            if len(self.columns) > 1:
                example = ", ".join(f'"{column}": "..."' for column in self.columns)
                raise UserError(
                    f"a bare text, but the input has the columns "
                    f"{', '.join(self.columns)}: use {{{example}}}, or the whole input with raw "
                    "(--raw)"
                )
            return self._parsed.render({self.columns[0]: given})
        if not self.columns:
            raise UserError("an object, but the input must be a text")
        values = {}
        for column in self.columns:
            if column not in given:
                raise UserError(f"no column {column!r}: {suggest(column, map(str, given))}")
            values[column] = value_text(given[column], column)
        if self.from_text is not None:
            return self.from_text(values[self.columns[0]])
        assert self._parsed is not None
        return self._parsed.render(values)

    def length_with(self, given: Given) -> int:
        """Returns a lower bound of the number of characters of ``apply``."""
        if self._parsed is None or self.from_text is not None:
            return 0
        each = {c: given if isinstance(given, str) else given.get(c, "") for c in self.columns}
        lengths = {c: len(value) if isinstance(value, str) else 0 for c, value in each.items()}
        return sum(map(len, self._parsed.literals)) + sum(lengths[c] for c in self._parsed.columns)

    @cached_property
    def _parsed(self) -> TextTemplate | None:
        return parse_template(self.template, field="inputs_template") if self.template else None


AS_IT_IS = Wording()


def wording_of(task: str, template: str, *, chat: bool = False) -> Wording:
    """Returns the wording for a task's name and a template, from the metadata of a prompt.

    A known task words texts itself; for others the template is used.  UserError for an invalid
    template.
    """
    known = tasks_known_as(task)
    from_text, index = (known[0].from_text, known[0].index) if len(known) == 1 else (None, None)
    if from_text is not None:
        template = template_of(from_text)
    checked_template(template)
    return Wording(template=template, from_text=from_text, chat=chat, index=index)


def shared_wording(wordings: Mapping[str, Wording]) -> Wording:
    """Returns the common wording of the members of an ensemble, given by name.

    Members of unknown wording follow the others.  UserError if two differ, because one text cannot
    be worded for both.
    """
    known = {name: one for name, one in wordings.items() if one != AS_IT_IS}
    if not known:
        return AS_IT_IS
    first, wording = next(iter(known.items()))
    for name, other in known.items():
        if other.key != wording.key:
            raise UserError(
                f"{first} was trained with the template {wording.shown!r} and {name} with "
                f"{other.shown!r}: one text cannot have both"
            )
    return wording


def checked_template(template: str) -> str:
    """Returns the template itself; UserError if it is invalid or too long."""
    if len(template) > LONGEST_TEMPLATE:
        raise UserError(
            f"inputs_template has {len(template):,} characters; at most {LONGEST_TEMPLATE:,} are "
            "allowed"
        )
    if template:
        parse_template(template, field="inputs_template")
    return template


def template_of(from_text: Callable[[str], str]) -> str:
    """Returns ``"valence: {text}"`` for a function that adds words around a text.

    Returns "" for any other function.
    """
    before, mark, after = from_text(_MARK).partition(_MARK)
    if not mark or _MARK in after or from_text("a b") != f"{before}a b{after}":
        return ""
    return f"{_literal(before)}{{{_TEXT}}}{_literal(after)}"


def template_of_column(column: str) -> str:
    """Returns the template with one column; empty for a name that templates cannot represent."""
    fits = column and column == column.strip() and not {*"{}"} & {*column}
    return f"{{{column}}}" if fits else ""


def _literal(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
