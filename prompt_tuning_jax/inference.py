"""Uses a model with a prompt: encode, generate text, score text, logits.

Inputs are padded to few lengths and numbers of rows, so that programs are compiled for these alone;
what is returned has the shape of what was given.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax import tree
from prompt_tuning_jax.data.vocab import PAD_ID
from prompt_tuning_jax.decoding.beam import BeamRule, HuggingFaceRule, T5XRule
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.member_programs import (
    Strategy,
    Writing,
    encoded,
    target_logits,
    target_scores,
    write,
)
from prompt_tuning_jax.methods import Attached, Context, NoTuning, PromptTuning
from prompt_tuning_jax.models.t5 import T5
from prompt_tuning_jax.typing import Array, HostArray

# Token ids [B, T] with 0 as padding, or texts where the model has its vocabulary.
Inputs: TypeAlias = Array | HostArray | Sequence[str] | str
EOS = 1
_SHORTEST_INPUT, _SHORTEST_TARGET = 16, 4


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What ``generate`` writes, best first where there are several.

    ``ids`` ``[B, S]``, or ``[B, K, S]`` for beams, zeros behind the end; ``scores`` ``[B]`` or
    ``[B, K]``: summed log-probability, for beams by their rule; ``texts`` where the model has a
    vocabulary: the (best) text of each row.
    """

    ids: HostArray
    scores: HostArray
    texts: list[str] | None


def encode(
    model: T5 | Attached, encoder_input_tokens: Inputs, prompt: Array | None = None
) -> Array:
    """The encoder's output ``[B, P + T, D]``; ``prompt`` is ``[P, D]`` or ``[B, P, D]``."""
    attached, tokens_BT, rows, length = _ready(model, encoder_input_tokens, prompt)
    graphdef, params = tree.split(attached)
    hidden_BUD = encoded(graphdef, params, tokens_BT)
    # What is added to the input stands before its padding.
    return hidden_BUD[:rows, : hidden_BUD.shape[1] - tokens_BT.shape[1] + length]


def generate(
    model: T5 | Attached,
    inputs: Inputs,
    prompt: Array | HostArray | None = None,
    strategy: Strategy = "greedy",
    *,
    max_length: int = 32,
    num_beams: int = 4,
    length_penalty: float = 0.6,
    beam_rule: Literal["t5x", "hf"] = "t5x",
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Generated:
    """Writes at most ``max_length`` tokens for each input, the end-of-sequence token included.

    ``prompt`` is ``[P, D]``, one per example ``[B, P, D]``, or None for the bare model, or for one
    that has something attached to it.
    ``length_penalty`` is the exponent of the beam rule; ``temperature``, ``top_k``, ``top_p`` and
    ``seed`` are for ``sample``.
    """
    rules: dict[str, BeamRule] = {
        "t5x": T5XRule(alpha=length_penalty),
        "hf": HuggingFaceRule(length_penalty=length_penalty),
    }
    for name, value in (("max_length", max_length), ("num_beams", num_beams)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    if strategy not in ("greedy", "beam", "sample") or beam_rule not in rules:
        raise UserError(
            f"strategy is {strategy!r} and beam_rule {beam_rule!r}; choose greedy, beam or sample, "
            "and t5x or hf"
        )
    writing = Writing(
        strategy=strategy,
        max_length=max_length,
        num_beams=num_beams,
        beam_rule=rules[beam_rule],
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    attached, tokens_BT, rows, _ = _ready(model, inputs, prompt)
    graphdef, params = tree.split(attached)
    ids, scores = write(graphdef, writing, {}, params, tokens_BT, jax.random.key(seed))
    ids, scores = np.asarray(ids[0])[:rows], np.asarray(scores[0])[:rows]
    best_BS = ids[:, 0] if ids.ndim == 3 else ids
    words = attached.model.vocabulary
    texts = None if words is None else [words.decode(row.tolist()) for row in best_BS]
    return Generated(ids=ids, scores=scores, texts=texts)


def score(
    model: T5 | Attached, inputs: Inputs, targets: Inputs, prompt: Array | HostArray | None = None
) -> HostArray:
    """The summed log-probability ``[B]`` of each target given its input, in float32."""
    attached, tokens_BT, rows, _ = _ready(model, inputs, prompt)
    targets_BS, _ = _padded_targets(attached, targets, rows=rows, padded_rows=len(tokens_BT))
    graphdef, params = tree.split(attached)
    return np.asarray(target_scores(graphdef, {}, params, tokens_BT, targets_BS)[0])[:rows]


def logits(
    model: T5 | Attached, inputs: Inputs, targets: Inputs, prompt: Array | HostArray | None = None
) -> HostArray:
    """The logits ``[B, S, V]`` in float32 that predict the targets: ``[:, s]`` is for token s.

    ``prompt`` is as in ``generate``.  Behind the end of a shorter target they mean nothing.
    UserError for a method that scores labels itself.
    """
    attached, tokens_BT, rows, _ = _ready(model, inputs, prompt)
    if attached.method.own_labels:
        raise UserError("this method ranks labels and has no logits of tokens; use score")
    targets_BS, length = _padded_targets(attached, targets, rows=rows, padded_rows=len(tokens_BT))
    graphdef, params = tree.split(attached)
    return np.asarray(target_logits(graphdef, params, tokens_BT, targets_BS)[:rows, :length])


def padded_size(number: int, *, least: int = 1) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24 and so on, from ``least``, that holds it."""
    size = least
    while size < number:
        # From a power of two to one and a half of it, from there to the next.
        size = size * 4 // 3 if size % 3 == 0 else max(size * 3 // 2, size + 1)
    return size


def token_ids(model: T5, inputs: Inputs) -> HostArray:
    """Token ids ``[B, T]`` int32, padded with 0; texts get an end-of-sequence token."""
    if isinstance(inputs, str):
        inputs = [inputs]
    if not len(inputs):
        raise UserError("there are no inputs; give one text, or one row of token ids, at least")
    if not isinstance(inputs, (jax.Array, np.ndarray)) and all(isinstance(x, str) for x in inputs):
        if model.vocabulary is None:
            raise UserError("this model came without a vocabulary: give token ids, not text")
        rows = [[*model.vocabulary.encode(text), EOS] for text in inputs]
        ids_BT = np.zeros((len(rows), max(map(len, rows), default=1)), np.int32)
        for row, ids in zip(ids_BT, rows, strict=True):
            row[: len(ids)] = ids
        return ids_BT
    if not isinstance(inputs, (jax.Array, np.ndarray)) and any(isinstance(x, str) for x in inputs):
        number = next(n for n, x in enumerate(inputs) if not isinstance(x, str))
        found = str(inputs[number])[:40]
        raise UserError(f"inputs[{number}] is {found!r} and no text, as others are")
    try:
        ids_BT = np.asarray(inputs)
    except ValueError:
        raise UserError(
            "token ids have rows of different lengths and not the shape [batch, length]; "
            "pad them with 0"
        ) from None
    if ids_BT.ndim != 2 or ids_BT.dtype.kind not in "iu":
        raise UserError(
            f"token ids are whole numbers of shape [batch, length]; got {ids_BT.dtype} "
            f"{list(ids_BT.shape)}"
        )
    if ids_BT.size and not 0 <= ids_BT.min() <= ids_BT.max() < model.config.vocab_size:
        raise UserError(
            f"token ids must be from 0 to {model.config.vocab_size - 1}; "
            f"got {ids_BT.min()} to {ids_BT.max()}"
        )
    return ids_BT.astype(np.int32)


def as_prompt(model: T5, prompt: Array | HostArray | None, *, batch: int) -> Array | None:
    """The prompt as float32, ``[P, D]`` or ``[B, P, D]``; UserError where it does not fit."""
    if prompt is None:
        return None
    given: object = prompt  # not everybody checks types
    if isinstance(given, str | Path):
        raise UserError(
            f"prompt is an array, and {str(given)!r} is a path: attach takes a run, a file or an "
            "adapter, and load_prompt reads a prompt's file"
        )
    array = jnp.asarray(prompt, jnp.float32)
    width = model.config.embed_dim
    if (
        array.ndim not in (2, 3)
        or array.shape[-1] != width
        or (array.ndim == 3 and array.shape[0] != batch)
    ):
        raise UserError(
            f"a prompt for this model and batch has shape [P, {width}] or [{batch}, P, {width}]; "
            f"got {list(array.shape)}"
        )
    return array


def require_model(model: object) -> None:
    """UserError for what is no model."""
    if not isinstance(model, T5 | Attached):
        named = f"load_model({model!r}) opens it" if isinstance(model, str | Path) else "load_model"
        raise UserError(f"model is a {type(model).__name__}, and no model: {named}")


def _ready(
    model: T5 | Attached, inputs: Inputs, prompt: Array | HostArray | None
) -> tuple[Attached, HostArray, int, int]:
    """The model with its prompt or whatever else is attached; the inputs' token ids, padded.

    Then how many rows and positions were given.
    """
    require_model(model)
    if isinstance(model, Attached):
        if prompt is not None:
            raise UserError("this model has something attached to it already: leave out prompt")
        tokens_BT = token_ids(model.model, inputs)
        more_rows = not _has_rows_of_its_own(model, len(tokens_BT))
        return model, _padded(tokens_BT, more_rows=more_rows), *tokens_BT.shape
    tokens_BT = token_ids(model, inputs)
    rows, length = tokens_BT.shape
    array = as_prompt(model, prompt, batch=rows)
    tokens_BT = _padded(tokens_BT)
    if array is None:
        attached = NoTuning().attach(model, key=jax.random.key(0), context=Context())
        return attached, tokens_BT, rows, length
    if array.ndim == 3:
        spare = ((0, len(tokens_BT) - rows), (0, 0), (0, 0))
        array = jnp.pad(array, spare, mode="edge")
    return PromptTuning().with_prompt(model, array), tokens_BT, rows, length


def _padded(tokens_BT: HostArray, *, more_rows: bool = True) -> HostArray:
    """Padding at the right, and copies of the last row: all of it is cut off the results."""
    rows, length = tokens_BT.shape
    spare = padded_size(rows) - rows if more_rows else 0
    tokens_BT = np.pad(tokens_BT, ((0, spare), (0, 0)), mode="edge")
    positions = padded_size(length, least=_SHORTEST_INPUT) - length
    return np.pad(tokens_BT, ((0, 0), (0, positions)), constant_values=PAD_ID)


def _padded_targets(
    attached: Attached, targets: Inputs, *, rows: int, padded_rows: int
) -> tuple[HostArray, int]:
    """The targets' token ids for the padded inputs, and how many positions were given."""
    targets_BS = token_ids(attached.model, targets)
    if len(targets_BS) != rows:
        raise UserError(f"there are {rows} inputs and {len(targets_BS)} targets")
    length = targets_BS.shape[1]
    positions = padded_size(length, least=_SHORTEST_TARGET) - length
    padded_BS = np.pad(targets_BS, ((0, 0), (0, positions)), constant_values=PAD_ID)
    return np.pad(padded_BS, ((0, padded_rows - rows), (0, 0)), mode="edge"), length


def _has_rows_of_its_own(attached: Attached, rows: int) -> bool:
    """Whether arrays of the method may be one for each row of the batch."""
    params = tree.split(attached)[1]
    return any(
        name.startswith("method/") and array.ndim > 2 and len(array) == rows
        for name, array in params.items()
    )
