"""Uses a model with a prompt: encode, generate text, score text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax import tree
from prompt_tuning_jax.decoding.beam import BeamRule, HuggingFaceRule, T5XRule
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.member_programs import Strategy, Writing, target_scores, write
from prompt_tuning_jax.methods import Attached, Context, NoTuning, PromptTuning
from prompt_tuning_jax.models.t5 import T5
from prompt_tuning_jax.typing import Array, HostArray

# Token ids [B, T] with 0 as padding, or texts where the model has its vocabulary.
Inputs: TypeAlias = Array | HostArray | Sequence[str] | str
EOS = 1


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
    attached, tokens_BT = _ready(model, encoder_input_tokens, prompt)
    return attached.encode(tokens_BT)[0].hidden_BUD


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
    attached, tokens_BT = _ready(model, inputs, prompt)
    graphdef, params = tree.split(attached)
    ids, scores = write(graphdef, writing, {}, params, tokens_BT, jax.random.key(seed))
    ids, scores = np.asarray(ids[0]), np.asarray(scores[0])
    best_BS = ids[:, 0] if ids.ndim == 3 else ids
    words = attached.model.vocabulary
    texts = None if words is None else [words.decode(row.tolist()) for row in best_BS]
    return Generated(ids=ids, scores=scores, texts=texts)


def score(
    model: T5 | Attached, inputs: Inputs, targets: Inputs, prompt: Array | HostArray | None = None
) -> HostArray:
    """The summed log-probability ``[B]`` of each target given its input, in float32."""
    attached, tokens_BT = _ready(model, inputs, prompt)
    targets_BS = token_ids(attached.model, targets)
    if len(targets_BS) != len(tokens_BT):
        raise UserError(f"there are {len(tokens_BT)} inputs and {len(targets_BS)} targets")
    graphdef, params = tree.split(attached)
    return np.asarray(target_scores(graphdef, {}, params, tokens_BT, targets_BS)[0])


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
) -> tuple[Attached, HostArray]:
    """The model with its prompt or whatever else is attached, and the inputs' token ids."""
    require_model(model)
    if isinstance(model, Attached):
        if prompt is not None:
            raise UserError("this model has something attached to it already: leave out prompt")
        return model, token_ids(model.model, inputs)
    tokens_BT = token_ids(model, inputs)
    array = as_prompt(model, prompt, batch=len(tokens_BT))
    if array is None:
        return NoTuning().attach(model, key=jax.random.key(0), context=Context()), tokens_BT
    return PromptTuning().with_prompt(model, array), tokens_BT
