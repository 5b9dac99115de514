"""Runs a model with a prompt: encodes, generates and scores text, and computes logits.

Inputs are padded to a few fixed batch sizes and lengths, which limits the number of compiled
programs.  Results have the shape of the unpadded inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.data.batching.buckets import padded_size
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.decoding.beam import BeamRule, HuggingFaceRule, T5XRule
from prompt_tuning_jax.inference.decoding.checks import real_number, true_or_false, whole_number
from prompt_tuning_jax.inference.decoding.logits_processors import logits_processors
from prompt_tuning_jax.inference.ensemble import (
    DecodeConfig,
    Strategy,
    encoded,
    input_logits,
    target_logits,
    target_scores,
    write,
)
from prompt_tuning_jax.inference.setup import added_positions
from prompt_tuning_jax.methods import Context, NoTuning, TunedModel, attach_method
from prompt_tuning_jax.methods.prompt import with_prompt
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.typing import Array, HostArray

# Token ids [B, T] with the model's padding id (0 for T5) at the right, lists of token ids of any
# lengths, or texts if the model has a vocabulary.
Inputs: TypeAlias = Array | HostArray | Sequence[Sequence[int]] | Sequence[str] | str
_SHORTEST_INPUT, _SHORTEST_TARGET = 16, 4
# Larger values, such as a typo with an extra zero, would fail on the device.  With these limits,
# beams times vocabulary size fits an int32.
_LONGEST = 2**16
_MOST_BEAMS = 2**12


@dataclass(frozen=True, kw_only=True)
class Generated:
    """The output of ``generate``.

    Attributes:
      ids: token ids ``[B, S]``, or ``[B, K, S]`` for beam search, best first; padded after the end.
      scores: ``[B]`` or ``[B, K]``; the summed log-probability, or for beams the beam rule's score.
      texts: the (best) text of each row; None if the model has no vocabulary.
    """

    ids: HostArray
    scores: HostArray
    texts: list[str] | None


def encode(model: Model | TunedModel, inputs: Inputs, prompt: Array | None = None) -> Array:
    """Returns the final hidden states of the input; ``prompt`` is ``[P, D]`` or ``[B, P, D]``.

    An encoder's output ``[B, P + T, D]`` includes the positions of the prompt.  A decoder-only
    model's includes those of a prompt elsewhere than before the input; otherwise it is
    ``[B, T, D]``.
    """
    attached, tokens_BT, rows, length = _ready(model, inputs, prompt)
    _check_window(attached, tokens_BT)
    graphdef, params = param_tree.split(attached)
    hidden_BUD = encoded(graphdef, params, tokens_BT)
    # Positions added by a method precede the padding, so padding is cut from the end.
    return hidden_BUD[:rows, : hidden_BUD.shape[1] - tokens_BT.shape[1] + length]


def generate(
    model: Model | TunedModel,
    inputs: Inputs,
    prompt: Array | HostArray | None = None,
    strategy: Strategy = "greedy",
    *,
    max_length: int = 32,
    num_beams: int | None = None,
    length_penalty: float | None = None,
    beam_rule: Literal["t5x", "hf"] | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    min_length: int = 0,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
) -> Generated:
    """Generates at most ``max_length`` tokens for each input, including the end-of-sequence token.

    Args:
      model: a bare model, or a model with a method attached.
      inputs: texts, or token ids ``[B, T]``.
      prompt: ``[P, D]``, one per example ``[B, P, D]``, or None.
      strategy: ``greedy``, ``beam`` or ``sample``.
      max_length: the maximum number of tokens to generate.
      num_beams: beam only; defaults to 4.
      length_penalty: beam only; the exponent in the beam rule.  Defaults to 0.6 for ``t5x`` and to
        1.0 for ``hf``, as in T5X and transformers.
      beam_rule: beam only; ``t5x`` (the default) or ``hf``.
      temperature: sample only; defaults to 1.0.  0 decodes greedily.
      top_k: sample only; the number of tokens to sample from.  0 (the default) keeps all.
      top_p: sample only; the probability mass to sample from.  1.0 (the default) keeps all.
      seed: the random seed for sampling.
      min_length: the minimum number of tokens, including the end, as in transformers.
      repetition_penalty: as in transformers; 1.0 applies no penalty.
      no_repeat_ngram_size: no n-gram of this size is generated twice; 0 allows repeats.

    Raises UserError for an invalid option, or for an option of another strategy.
    """
    if strategy not in ("greedy", "beam", "sample"):
        raise UserError(f"strategy is {strategy!r}; choose greedy, beam or sample")
    require_own_options(
        strategy,
        num_beams=num_beams,
        length_penalty=length_penalty,
        beam_rule=beam_rule,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    max_length = whole_number("max_length", max_length, at_least=1, at_most=_LONGEST)
    writing = DecodeConfig(
        strategy=strategy,
        max_length=max_length,
        num_beams=4
        if num_beams is None
        else whole_number("num_beams", num_beams, at_least=1, at_most=_MOST_BEAMS),
        beam_rule=_beam_rule(beam_rule, length_penalty),
        temperature=1.0 if temperature is None else _temperature(temperature),
        top_k=0 if top_k is None else whole_number("top_k", top_k, at_least=0),
        top_p=1.0 if top_p is None else real_number("top_p", top_p, above=0, at_most=1),
    )
    processors = logits_processors(
        min_length=whole_number("min_length", min_length, at_least=0),
        repetition_penalty=real_number("repetition_penalty", repetition_penalty, above=0),
        no_repeat_ngram_size=whole_number("no_repeat_ngram_size", no_repeat_ngram_size, at_least=0),
        max_length=max_length,
    )
    key = jax.random.key(whole_number("seed", seed, at_least=0, at_most=2**32 - 1))
    attached, tokens_BT, rows, _ = _ready(model, inputs, prompt)
    _check_window(attached, tokens_BT, writes=max_length, of="max_length")
    graphdef, params = param_tree.split(attached)
    ids, scores = write(graphdef, writing, {}, params, tokens_BT, key, None, None, processors)
    ids, scores = np.asarray(ids[0])[:rows], np.asarray(scores[0])[:rows]
    best_BS = ids[:, 0] if ids.ndim == 3 else ids
    words = attached.model.vocabulary
    texts = None if words is None else [words.decode(row.tolist()) for row in best_BS]
    return Generated(ids=ids, scores=scores, texts=texts)


def score(
    model: Model | TunedModel,
    inputs: Inputs,
    targets: Inputs,
    prompt: Array | HostArray | None = None,
    *,
    normalize_length: bool = False,
) -> HostArray:
    """Returns the summed log-probability ``[B]`` of each target given its input, in float32.

    ``normalize_length`` returns the mean over the target's tokens instead, including its end.
    """
    mean = true_or_false("normalize_length", normalize_length)
    attached, tokens_BT, rows, _ = _ready(model, inputs, prompt)
    if mean and attached.method.label_tokens:
        raise UserError(
            "normalize_length: this method scores labels itself, and not by their tokens; leave "
            "it out"
        )
    targets_BS, length = _padded_targets(attached, targets, rows=rows, padded_rows=len(tokens_BT))
    _check_window(attached, tokens_BT, writes=length, of="the targets")
    graphdef, params = param_tree.split(attached)
    return np.asarray(target_scores(graphdef, {}, params, tokens_BT, targets_BS, mean)[0])[:rows]


def logits(
    model: Model | TunedModel,
    inputs: Inputs,
    targets: Inputs | None = None,
    prompt: Array | HostArray | None = None,
) -> HostArray:
    """Returns the float32 logits ``[B, S, V]`` that predict the targets: ``[:, s]`` is for token s.

    A decoder-only model needs no targets: the result then has the logits ``[B, T, V]`` of every
    input position, which predict the next token.  ``prompt`` is as in ``generate``.  Logits after
    the end of a shorter row are meaningless.  Raises UserError for a method that scores labels
    itself, and for an encoder-decoder without targets.
    """
    attached, tokens_BT, rows, length = _ready(model, inputs, prompt)
    if attached.method.label_tokens:
        raise UserError("this method ranks labels and has no logits of tokens; use score")
    if targets is None:
        if not attached.model.causal:
            raise UserError("targets are missing: an encoder-decoder has logits of targets only")
        _check_window(attached, tokens_BT)
        graphdef, params = param_tree.split(attached)
        logits_BUV = input_logits(graphdef, params, tokens_BT)
        cut = logits_BUV.shape[1] - tokens_BT.shape[1] + length
        return np.asarray(logits_BUV[:rows, :cut])
    targets_BS, length = _padded_targets(attached, targets, rows=rows, padded_rows=len(tokens_BT))
    _check_window(attached, tokens_BT, writes=length, of="the targets")
    graphdef, params = param_tree.split(attached)
    return np.asarray(target_logits(graphdef, params, tokens_BT, targets_BS)[:rows, :length])


_OPTIONS_OF = {
    "num_beams": "beam",
    "length_penalty": "beam",
    "beam_rule": "beam",
    "temperature": "sample",
    "top_k": "sample",
    "top_p": "sample",
}


def require_own_options(strategy: str, **given: object) -> None:
    """Raises UserError for the first option that is not None and belongs to another strategy."""
    for name, value in given.items():
        if value is not None and _OPTIONS_OF[name] != strategy:
            raise UserError(
                f"{name} is {value!r}, and it is for strategy={_OPTIONS_OF[name]!r}; strategy is "
                f"{strategy!r}"
            )


def _beam_rule(name: str | None, length_penalty: float | None) -> BeamRule:
    if name not in (None, "t5x", "hf"):
        raise UserError(f"beam_rule is {name!r}; choose t5x or hf")
    if length_penalty is None:
        return HuggingFaceRule() if name == "hf" else T5XRule()
    penalty = real_number("length_penalty", length_penalty)
    if name == "hf":
        return HuggingFaceRule(length_penalty=penalty)
    if penalty < 0:
        raise UserError(
            f"length_penalty is {penalty}; beam_rule t5x takes 0 or more (hf takes any number)"
        )
    return T5XRule(alpha=penalty)


def _temperature(value: object) -> float:
    number = real_number("temperature", value)
    if number < 0:
        raise UserError(f"temperature is {number}; it must be 0 (greedy) or more")
    return number


def token_ids(model: Model, inputs: Inputs, *, targets: bool = False) -> HostArray:
    """Returns int32 token ids ``[B, T]``, padded with the model's ``token_ids.fill``.

    Texts are encoded as in training: the model's end-of-sequence token is appended to targets, and
    an encoder-decoder's inputs end with its vocabulary's.  An array of token ids is padded at the
    right with the model's ``token_ids.pad``.  If that is also its end-of-sequence id, everything
    after the first end of a target is padding, and an encoder-decoder's inputs have none, as in
    transformers.  In a list of lists every id is real, and the rows may have different lengths.
    """
    name = "targets" if targets else "inputs"
    if model.config.reads_images:
        raise UserError("this model reads images, and this function takes text; use predict")
    if isinstance(inputs, str):
        inputs = [inputs]
    if not isinstance(inputs, jax.Array) and hasattr(inputs, "__array__"):
        inputs = np.asarray(inputs)  # also converts pandas and torch
    if isinstance(inputs, np.ndarray) and inputs.dtype.kind in "UO":
        if inputs.ndim != 1:
            raise UserError(f"an array of texts has shape [batch]; got {list(inputs.shape)}")
        inputs = inputs.tolist()
    is_array = isinstance(inputs, (jax.Array, np.ndarray))
    if is_array and np.ndim(inputs) == 0:
        raise UserError("token ids are whole numbers of shape [batch, length]; got a single number")
    if not is_array and not isinstance(inputs, Sequence):
        raise UserError(
            f"{name} is a {type(inputs).__name__}; give a text, a list of texts, or token ids of "
            "shape [batch, length]"
        )
    if not len(inputs):
        raise UserError(f"there are no {name}; give at least one text or one row of token ids")
    ids = model.token_ids
    if not is_array and all(isinstance(x, str) for x in inputs):
        if model.vocabulary is None:
            raise UserError("this model came without a vocabulary: give token ids, not text")
        words = model.vocabulary
        encode = words.encode_target if targets else words.encode_input
        return _filled([encode(text) for text in inputs], ids.fill)
    if not is_array and any(isinstance(x, str) for x in inputs):
        number = next(n for n, x in enumerate(inputs) if not isinstance(x, str))
        shown = str(inputs[number])[:40]
        raise UserError(f"{name}[{number}] is {shown!r}; it must be a text, as others are")
    for number, one in enumerate(() if is_array else inputs):
        if isinstance(one, bytes):
            raise UserError(f"{name}[{number}] is bytes; decode it to a text")
    rows: list[Any] = [] if is_array else [*inputs]
    given_rows = bool(rows) and all(isinstance(row, Sequence) for row in rows)
    if given_rows:
        for number, row in enumerate(rows):
            if not row:
                raise UserError(f"{name}[{number}] has no token ids; give every row at least one")
        # A float or a string among the ids makes this an array that is refused below.
        ids_BT = _array([id_ for row in rows for id_ in row])[None]
    else:
        ids_BT = _array(inputs)
    if ids_BT.ndim == 2 and not ids_BT.shape[1]:
        raise UserError(
            f"token ids have the shape {list(ids_BT.shape)}; give every row at least one"
        )
    if ids_BT.ndim != 2 or ids_BT.dtype.kind not in "iu":
        raise UserError(
            f"token ids are whole numbers of shape [batch, length]; got {ids_BT.dtype} "
            f"{list(ids_BT.shape)}"
        )
    if not 0 <= ids_BT.min() <= ids_BT.max() < model.config.vocab_size:
        raise UserError(
            f"token ids must be from 0 to {model.config.vocab_size - 1}; "
            f"got {ids_BT.min()} to {ids_BT.max()}"
        )
    if (image := ids.image) >= 0 and (ids_BT == image).any():
        raise UserError(
            f"the token id {image} stands for an image: images are not supported, and this model "
            "reads text alone"
        )
    if given_rows:
        return _filled(rows, ids.fill)
    return _with_padding(ids_BT.astype(np.int32), model, targets=targets)


def _array(ids: object) -> HostArray:
    try:
        return np.asarray(ids)
    except ValueError:  # of NumPy, whose arrays have rows of one length
        raise UserError(
            "token ids of rows of different lengths must be a list of lists of whole numbers"
        ) from None


def _filled(rows: Sequence[Sequence[int]], fill: int) -> HostArray:
    ids_BT = np.full((len(rows), max(map(len, rows))), fill, np.int32)
    for row, tokens in zip(ids_BT, rows, strict=True):
        row[: len(tokens)] = tokens
    return ids_BT


def _with_padding(ids_BT: HostArray, model: Model, *, targets: bool) -> HostArray:
    """Replaces the padding id of the caller's token ids with the model's ``fill``."""
    ids = model.token_ids
    if ids.fill == ids.pad:
        return ids_BT
    # Only at the end of a row: elsewhere the id may be a real token.
    is_padding_BT = np.cumprod((ids_BT == ids.pad)[:, ::-1], axis=1)[:, ::-1] > 0
    if ids.pad == ids.eos and targets:
        is_padding_BT = np.cumsum(ids_BT == ids.eos, axis=1) - (ids_BT == ids.eos) > 0
    elif ids.pad == ids.eos and not model.causal:
        return ids_BT
    return np.where(is_padding_BT, np.int32(ids.fill), ids_BT)


def as_prompt(model: Model, prompt: Array | HostArray | None, *, batch: int) -> Array | None:
    """Returns the prompt in float32, ``[P, D]`` or ``[B, P, D]``.

    Raises UserError if it does not fit the model or the batch.
    """
    if prompt is None:
        return None
    given: object = prompt  # callers may not type-check
    if isinstance(given, str | Path):
        raise UserError(
            f"prompt is an array, and {str(given)!r} is a path: attach takes a run, a file or an "
            "adapter, and load_prompt reads a prompt's file"
        )
    try:
        array = jnp.asarray(prompt, jnp.float32)
    except (TypeError, ValueError):
        raise UserError(
            f"prompt must be an array of numbers, not {type(given).__name__} {str(given)[:40]!r}"
        ) from None
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
    """Raises UserError if the argument is not a model."""
    if not isinstance(model, Model | TunedModel):
        opens = f"load_model({model!r})" if isinstance(model, str | Path) else "load_model"
        raise UserError(f"model must be a model, not {type(model).__name__}; {opens} opens one")


def _ready(
    model: Model | TunedModel, inputs: Inputs, prompt: Array | HostArray | None
) -> tuple[TunedModel, HostArray, int, int]:
    """Returns the model with its prompt or other method attached, and the padded token ids.

    The last two values are the numbers of rows and positions before padding.
    """
    require_model(model)
    if isinstance(model, TunedModel):
        if prompt is not None:
            raise UserError("this model has something attached to it already: leave out prompt")
        tokens_BT = token_ids(model.model, inputs)
        more_rows = not _has_rows_of_its_own(model, len(tokens_BT))
        fill = model.model.token_ids.fill
        return model, _padded(tokens_BT, fill, more_rows=more_rows), *tokens_BT.shape
    tokens_BT = token_ids(model, inputs)
    rows, length = tokens_BT.shape
    array = as_prompt(model, prompt, batch=rows)
    tokens_BT = _padded(tokens_BT, model.token_ids.fill)
    if array is None:
        attached = attach_method(model, NoTuning(), key=jax.random.key(0), context=Context())
        return attached, tokens_BT, rows, length
    if array.ndim == 3:
        spare = ((0, len(tokens_BT) - rows), (0, 0), (0, 0))
        array = jnp.pad(array, spare, mode="edge")
    return with_prompt(model, array), tokens_BT, rows, length


def _check_window(
    attached: TunedModel, tokens_BT: HostArray, *, writes: int = 0, of: str = ""
) -> None:
    """Raises UserError if a decoder-only model's positions do not hold prompt, input and target.

    ``writes`` is the length of the target, and ``of`` names it.
    """
    model = attached.model
    if not model.causal:
        return
    lengths_B = (tokens_BT != model.token_ids.fill).sum(axis=1)
    inside, before = added_positions(attached, rows=len(tokens_BT))
    added = inside + before
    if not inside and not lengths_B.min():
        raise UserError(
            f"inputs[{lengths_B.argmin()}] has no tokens; this model needs one, or a prompt"
        )
    window, longest = model.config.max_positions, int(lengths_B.max())
    # The last token that is written is not read.
    if window is not None and added + longest + max(writes - 1, 0) > window:
        target = f", {writes} of {of}" if writes else ""
        raise UserError(
            f"the model's window has {window} positions: {added} of the prompt, {longest} of the "
            f"longest input{target} do not fit; shorten the input"
        )


def _padded(tokens_BT: HostArray, fill: int, *, more_rows: bool = True) -> HostArray:
    """Pads on the right and repeats the last row; callers cut both off their results."""
    rows, length = tokens_BT.shape
    spare = padded_size(rows) - rows if more_rows else 0
    tokens_BT = np.pad(tokens_BT, ((0, spare), (0, 0)), mode="edge")
    positions = padded_size(length, least=_SHORTEST_INPUT) - length
    return np.pad(tokens_BT, ((0, 0), (0, positions)), constant_values=fill)


def _padded_targets(
    attached: TunedModel, targets: Inputs, *, rows: int, padded_rows: int
) -> tuple[HostArray, int]:
    """Returns the targets' token ids, padded like the inputs, and their length before padding."""
    targets_BS = token_ids(attached.model, targets, targets=True)
    if len(targets_BS) != rows:
        raise UserError(
            f"there are {rows} inputs and {len(targets_BS)} targets; give one target per input"
        )
    length = targets_BS.shape[1]
    positions = padded_size(length, least=_SHORTEST_TARGET) - length
    fill = attached.model.token_ids.fill
    padded_BS = np.pad(targets_BS, ((0, 0), (0, positions)), constant_values=fill)
    return np.pad(padded_BS, ((0, padded_rows - rows), (0, 0)), mode="edge"), length


def _has_rows_of_its_own(attached: TunedModel, rows: int) -> bool:
    """Returns whether the method may have arrays with one entry per row of the batch."""
    params = param_tree.split(attached)[1]
    return any(
        name.startswith("method/") and array.ndim > 2 and len(array) == rows
        for name, array in params.items()
    )
