"""Where a tuning method may put something into one forward pass of the frozen model."""

from dataclasses import dataclass

import jax

from prompt_tuning_jax.typing import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class EncoderInput:
    """What the encoder reads in place of token ids.

    ``embeddings_BUD``; ``mask_BU`` is true at real positions, those that others may look at;
    ``attention_mask_BUU`` (query, key), when given, takes away more: a query sees a key only where
    both allow it.  Its batch dimension may be 1.
    """

    embeddings_BUD: Array
    mask_BU: Array
    attention_mask_BUU: Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KeyValues:
    """Keys and values ``[B or 1, P, H, K]`` in front of a layer's own; every query sees them."""

    key_BPHK: Array
    value_BPHK: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Slots:
    """All slots of one forward pass; None leaves the model as it is.

    The prefixes have one entry per layer of their stack.  The remaining slot is in the modules:
    every ``Linear`` has an ``around`` (models/layers.py), ``decoder.logits_dense`` included.
    """

    encoder_input: EncoderInput | None = None
    encoder_prefixes: tuple[KeyValues, ...] | None = None
    decoder_prefixes: tuple[KeyValues, ...] | None = None
    cross_prefixes: tuple[KeyValues, ...] | None = None


NO_SLOTS = Slots()
