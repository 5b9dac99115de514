"""Where a tuning method may put something into one forward pass of the frozen model."""

from dataclasses import dataclass, field, replace

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
    """Keys and values ``[B or 1, P, H, K]`` in front of a layer's own; every query sees them.

    They have no positions, or in self-attention the P ``before`` the sequence.
    """

    key_BPHK: Array
    value_BPHK: Array
    before: bool = field(default=False, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LayerPrompt:
    """Vectors ``[B or 1, P, D]`` for the first positions of what a layer reads.

    They stand there in place of what the layer below made, or are added to it.
    """

    vectors_BPD: Array
    add: bool = field(default=False, metadata={"static": True})

    def put_into(self, x_BUD: Array) -> Array:
        length = self.vectors_BPD.shape[1]
        vectors_BPD = self.vectors_BPD.astype(x_BUD.dtype)
        if self.add:
            return x_BUD.at[:, :length].add(vectors_BPD)
        return x_BUD.at[:, :length].set(vectors_BPD)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Injections:
    """All slots of one forward pass; None leaves the model as it is.

    The prefixes have one entry per layer of their stack, and so have the prompts of the encoder's
    layers (None: none).  The remaining slot is in the modules:
    every ``Linear`` has an ``adapter`` (models/layers.py), ``decoder.logits_dense`` included.
    """

    encoder_input: EncoderInput | None = None
    layer_prompts: tuple[LayerPrompt | None, ...] | None = None
    encoder_prefixes: tuple[KeyValues, ...] | None = None
    decoder_prefixes: tuple[KeyValues, ...] | None = None
    cross_prefixes: tuple[KeyValues, ...] | None = None

    def of_decoder(self) -> "Injections":
        """Those that are still needed when the encoder has run."""
        return replace(self, encoder_input=None, layer_prompts=None, encoder_prefixes=None)


NO_INJECTIONS = Injections()
