"""Inputs that a tuning method injects into a forward pass of the frozen model."""

from dataclasses import dataclass, field, replace

import jax

from prompt_tuning_jax.typing import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class EncoderInput:
    """The embedded input of the encoder, which replaces token ids.

    ``mask_BU`` is true at real positions, which other positions may attend to.  The optional
    ``attention_mask_BUU`` (query, key) restricts attention further: a query sees a key only if both
    masks allow it.  The batch dimension of ``attention_mask_BUU`` may be 1.
    """

    embeddings_BUD: Array
    mask_BU: Array
    attention_mask_BUU: Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KeyValues:
    """Keys and values ``[B or 1, P, H, K]`` prepended to those of a layer; every query sees them.

    They have no positions by default.  In self-attention, ``before`` assigns them the P positions
    before the sequence.
    """

    key_BPHK: Array
    value_BPHK: Array
    before: bool = field(default=False, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LayerPrompt:
    """Vectors ``[B or 1, P, D]`` for the first P positions of a layer's input.

    They replace the output of the layer below, or are added to it if ``add`` is true.
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
    """All injections of one forward pass; a field that is None changes nothing.

    Prefixes have one entry per layer of their stack.  ``layer_prompts`` has one entry per encoder
    layer, where None means no prompt.  Adapters are not part of this class: every ``Linear``,
    including ``decoder.logits_dense``, has an ``adapter`` attribute (models/layers.py).
    """

    encoder_input: EncoderInput | None = None
    layer_prompts: tuple[LayerPrompt | None, ...] | None = None
    encoder_prefixes: tuple[KeyValues, ...] | None = None
    decoder_prefixes: tuple[KeyValues, ...] | None = None
    cross_prefixes: tuple[KeyValues, ...] | None = None

    def of_decoder(self) -> "Injections":
        """Returns the injections that are still needed after the encoder has run."""
        return replace(self, encoder_input=None, layer_prompts=None, encoder_prefixes=None)


NO_INJECTIONS = Injections()
