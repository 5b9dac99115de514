"""Where prompt vectors and given words stand in the input, as a text says it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp

from prompt_tuning_jax.data.vocabularies.vocab import Vocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.injections import EncoderInput
from prompt_tuning_jax.models.t5.model import T5, prepend
from prompt_tuning_jax.typing import Array, HostArray

_PIECE = re.compile(r"\{([^{}]*)\}")
_NAMED = re.compile(r"(prompt|input)(?::(\d+))?")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """``prompt``: so many vectors; ``input``: so many tokens, 0 for the rest; ``words``: a text."""

    kind: str
    number: int = 0
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Template:
    """What stands in the encoder's input, from left to right.

    Written ``{prompt:3} It is about {prompt:3} {input} {prompt:3}``: ``{prompt:N}`` is N trained
    vectors, ``{prompt}`` as many as the method's ``length``, and words outside of braces are
    anchors, which stay what the model's embeddings make of them.  ``{input}`` is the input;
    ``{input:N}`` in front of it the next N tokens, so that something can stand within.  What is
    behind the input comes before its end-of-sequence token.
    """

    pieces: tuple[Piece, ...]

    @property
    def prompt_length(self) -> int:
        """Trained vectors."""
        return sum(piece.number for piece in self.pieces if piece.kind == "prompt")

    def without_words(self, placed: "Placed") -> str:
        """The text of a template whose anchors are trained vectors, too, like any other."""
        texts: list[str] = []
        passed = 0
        for piece in self.pieces:
            if piece.kind != "input":
                continue
            texts += _vectors_behind(passed, placed.behind)
            texts.append(f"{{input:{piece.number}}}" if piece.number else "{input}")
            passed = passed + piece.number if piece.number else -1
        return " ".join([*texts, *_vectors_behind(-1, placed.behind)])


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A template in a vocabulary: one entry per vector that is added to the input.

    ``anchors`` holds an anchor's token id or -1 for a trained vector; ``behind`` after how many of
    the input's tokens the vector stands, rising, -1 being behind all of them.
    """

    anchors: tuple[int, ...]
    behind: tuple[int, ...]


def parse_template(text: str, *, length: int, field: str = "method.template") -> Template:
    """The template that a text says; UserError for what is none."""
    pieces: list[Piece] = []
    at = 0
    for match in _PIECE.finditer(text):
        pieces += _words(text[at : match.start()])
        at = match.end()
        named = _NAMED.fullmatch(match[1].strip())
        number = int(named[2]) if named and named[2] else 0
        if named is None or (named[2] and not number):
            raise UserError(
                f"{field}: {match[0]} is no piece; write {{prompt}}, {{prompt:N}}, {{input}} or "
                "{input:N} with N from 1 on, and words"
            )
        number = number or (length if named[1] == "prompt" else 0)
        pieces.append(Piece(kind=named[1], number=number))
    pieces += _words(text[at:])
    inputs = [piece.number for piece in pieces if piece.kind == "input"]
    if inputs.count(0) != 1 or inputs[-1] != 0:
        raise UserError(f"{field}: {text!r} must have {{input}} once, behind every {{input:N}}")
    if "{" in _PIECE.sub("", text) or "}" in _PIECE.sub("", text):
        raise UserError(f"{field}: {text!r} has a brace without its other half")
    return Template(pieces=tuple(pieces))


def place(template: Template, vocabulary: Vocabulary | None) -> Placed:
    """The template with its anchors as tokens; UserError where they cannot be had."""
    anchors: list[int] = []
    behind: list[int] = []
    passed = 0
    for piece in template.pieces:
        ids: Sequence[int] = ()
        if piece.kind == "input":
            passed = passed + piece.number if piece.number else -1
        elif piece.kind == "prompt":
            ids = [-1] * piece.number
        elif vocabulary is None:
            raise UserError(
                f"method.template has the words {piece.text!r} and the model no vocabulary; "
                "set model.vocabulary"
            )
        else:
            ids = vocabulary.encode(piece.text)
        anchors += ids
        behind += [passed] * len(ids)
    return Placed(anchors=tuple(anchors), behind=tuple(behind))


def vectors(placed: Placed, prompt_PD: Array, model: T5) -> Array:
    """All vectors ``[A, D]`` that are added: the trained ones, and the anchors' embeddings."""
    trained_A = [anchor < 0 for anchor in placed.anchors]
    if all(trained_A):
        return prompt_PD
    given_AD = model.token_embedder(
        jnp.asarray([max(anchor, 0) for anchor in placed.anchors], jnp.int32)
    )
    at = jnp.asarray([i for i, trained in enumerate(trained_A) if trained], jnp.int32)
    return given_AD.astype(prompt_PD.dtype).at[at].set(prompt_PD)


def put(
    vectors_AD: Array,
    source: EncoderInput,
    tokens_BT: Array | HostArray,
    behind: Sequence[int],
    *,
    eos_id: int = 1,
) -> EncoderInput:
    """The vectors put into the embedded input, each behind so many of its tokens (-1: all).

    Tokens are those before the end-of-sequence token and the padding; where an input has fewer than
    a vector asks for, the vector stands behind its last.
    """
    joined = prepend(vectors_AD, source)
    if not any(behind):
        return joined
    tokens_BT = jnp.asarray(tokens_BT)
    words_B = jnp.sum(source.mask_BU & (tokens_BT != eos_id), axis=1)
    asked_A = jnp.asarray([tokens_BT.shape[1] if n < 0 else n for n in behind], jnp.int32)
    behind_BA = jnp.minimum(asked_A[None, :], words_B[:, None])
    # joined holds the vectors first: say for each of its positions where it goes.
    vector_to_BA = behind_BA + jnp.arange(len(behind))[None, :]
    positions_T = jnp.arange(tokens_BT.shape[1])
    before_BT = jnp.sum(behind_BA[:, None, :] <= positions_T[None, :, None], axis=2)
    to_BU = jnp.concatenate([vector_to_BA, before_BT + positions_T[None, :]], axis=1)
    from_BU = jnp.argsort(to_BU, axis=1)
    return replace(
        joined,
        embeddings_BUD=jnp.take_along_axis(joined.embeddings_BUD, from_BU[:, :, None], axis=1),
        mask_BU=jnp.take_along_axis(joined.mask_BU, from_BU, axis=1),
    )


def _words(text: str) -> list[Piece]:
    return [Piece(kind="words", text=text.strip())] if text.strip() else []


def _vectors_behind(passed: int, behind: Sequence[int]) -> list[str]:
    number = list(behind).count(passed)
    return [f"{{prompt:{number}}}"] if number else []
