"""Prompt templates: the placement of trained vectors and fixed words in the input."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp

from prompt_tuning_jax.config.prompt_template import PromptTemplate
from prompt_tuning_jax.data.vocabularies.vocab import Vocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods.prompt_combine import num_before_eos
from prompt_tuning_jax.models.base import Model, joined, with_prompt
from prompt_tuning_jax.models.injections import ModelInput
from prompt_tuning_jax.typing import Array, HostArray


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A tokenized template, with one entry per vector that is added to the input.

    ``anchors`` holds the token id of an anchor (a fixed word), or -1 for a trained vector.
    ``behind`` holds the number of input tokens before the vector, in ascending order; -1 means all
    of them and comes last.
    """

    anchors: tuple[int, ...]
    behind: tuple[int, ...]


def place(template: PromptTemplate, vocabulary: Vocabulary | None) -> Placed:
    """Tokenizes the anchors of a template.

    Raises UserError if the template has anchors and ``vocabulary`` is None.
    """
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


def vectors(placed: Placed, prompt_PD: Array, model: Model) -> Array:
    """Returns all added vectors ``[A, D]``: the trained vectors and the anchors' embeddings."""
    trained_A = [anchor < 0 for anchor in placed.anchors]
    if all(trained_A):
        return prompt_PD
    given_AD = model.embed_tokens(
        jnp.asarray([max(anchor, 0) for anchor in placed.anchors], jnp.int32)
    )
    at = jnp.asarray([i for i, trained in enumerate(trained_A) if trained], jnp.int32)
    return given_AD.astype(prompt_PD.dtype).at[at].set(prompt_PD)


def put(
    vectors_AD: Array,
    source: ModelInput,
    tokens_BT: Array | HostArray,
    behind: Sequence[int],
    *,
    eos_id: int = 1,
) -> ModelInput:
    """Inserts each vector into the embedded input after ``behind`` of its tokens (-1: all).

    Only tokens before the end-of-sequence token and the padding count.  If an input has fewer
    tokens than requested, the vector follows its last token.
    """
    before = with_prompt(source, vectors_AD)
    if not any(behind):
        return before
    whole = joined(before)
    words_B = num_before_eos(source, tokens_BT, eos_id=eos_id)
    asked_A = jnp.asarray([tokens_BT.shape[1] if n < 0 else n for n in behind], jnp.int32)
    behind_BA = jnp.minimum(asked_A[None, :], words_B[:, None])
    # ``whole`` starts with the vectors; compute the target of each of its positions.
    vector_to_BA = behind_BA + jnp.arange(len(behind))[None, :]
    positions_T = jnp.arange(tokens_BT.shape[1])
    before_BT = jnp.sum(behind_BA[:, None, :] <= positions_T[None, :, None], axis=2)
    to_BU = jnp.concatenate([vector_to_BA, before_BT + positions_T[None, :]], axis=1)
    from_BU = jnp.argsort(to_BU, axis=1)
    return replace(
        whole,
        embeddings_BUD=jnp.take_along_axis(whole.embeddings_BUD, from_BU[:, :, None], axis=1),
        mask_BU=jnp.take_along_axis(whole.mask_BU, from_BU, axis=1),
    )


def without_words(template: PromptTemplate, placed: Placed) -> str:
    """Returns the template's text with every anchor replaced by a trained vector."""
    texts: list[str] = []
    passed = 0
    for piece in template.pieces:
        if piece.kind != "input":
            continue
        texts += _vectors_behind(passed, placed.behind)
        texts.append(f"{{input:{piece.number}}}" if piece.number else "{input}")
        passed = passed + piece.number if piece.number else -1
    return " ".join([*texts, *_vectors_behind(-1, placed.behind)])


def _vectors_behind(passed: int, behind: Sequence[int]) -> list[str]:
    number = list(behind).count(passed)
    return [f"{{prompt:{number}}}"] if number else []
