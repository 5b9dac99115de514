"""A text that arranges prompt vectors, anchor words and the input of a method."""

import re
from dataclasses import dataclass

from prompt_tuning_jax.errors import UserError

_BRACES = re.compile(r"\{([^{}]*)\}")
_NAMED = re.compile(r"(prompt|input)(?::(\d+))?")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """``prompt``: ``number`` vectors; ``input``: ``number`` tokens (0: the rest); or ``words``."""

    kind: str
    number: int = 0
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """The encoder's input from left to right.

    Written ``{prompt:3} It is about {prompt:3} {input} {prompt:3}``: ``{prompt:N}`` is N trained
    vectors, ``{prompt}`` as many as the method's ``length``, and words outside of braces are
    anchors, which keep the model's embeddings.  ``{input}`` is the input; ``{input:N}`` in front of
    it is its next N tokens, so that something can be put between its tokens.  What is behind the
    input comes before its end-of-sequence token.
    """

    pieces: tuple[Piece, ...]

    @property
    def prompt_length(self) -> int:
        """The number of trained vectors."""
        return sum(piece.number for piece in self.pieces if piece.kind == "prompt")


def parse_prompt_template(
    text: str, *, length: int, field: str = "method.template"
) -> PromptTemplate:
    """Parses a template; UserError if it is invalid."""
    pieces: list[Piece] = []
    start = 0
    for match in _BRACES.finditer(text):
        pieces += _words(text[start : match.start()])
        start = match.end()
        named = _NAMED.fullmatch(match[1].strip())
        number = int(named[2]) if named and named[2] else 0
        if named is None or (named[2] and not number):
            raise UserError(
                f"{field}: {match[0]} is not a valid piece; write {{prompt}}, {{prompt:N}}, "
                "{input} or {input:N} with N of at least 1, and words"
            )
        number = number or (length if named[1] == "prompt" else 0)
        pieces.append(Piece(kind=named[1], number=number))
    pieces += _words(text[start:])
    inputs = [piece.number for piece in pieces if piece.kind == "input"]
    if inputs.count(0) != 1 or inputs[-1] != 0:
        raise UserError(f"{field}: {text!r} must have {{input}} once, behind every {{input:N}}")
    if "{" in _BRACES.sub("", text) or "}" in _BRACES.sub("", text):
        raise UserError(f"{field}: {text!r} has an unmatched brace")
    return PromptTemplate(pieces=tuple(pieces))


def _words(text: str) -> list[Piece]:
    return [Piece(kind="words", text=text.strip())] if text.strip() else []
