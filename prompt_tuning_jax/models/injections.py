"""Inputs that a tuning method injects into a forward pass of the frozen model."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax

from prompt_tuning_jax.typing import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ModelInput:
    """An embedded input, which replaces token ids.

    ``mask_BU`` is true at real positions, which other positions may attend to.  ``prompt_BPD``,
    with a batch dimension of 1 or B, comes before every row.  The optional ``attention_mask_BUU``
    (query, key), over the prompt and the input, restricts attention further: a query sees a key
    only if both masks allow it.  Its batch dimension may be 1.

    With ``prompt_mask_PP`` (query, key) the prompt sees none of the input, and of itself what the
    mask allows.  It can then be read once for all rows.
    """

    embeddings_BUD: Array
    mask_BU: Array
    prompt_BPD: Array | None = None
    prompt_mask_PP: Array | None = None
    attention_mask_BUU: Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KeyValues:
    """Keys and values ``[B or 1, P, G, K]`` of one layer: of a prefix, an input or a cache.

    Those of a prefix are prepended to the layer's, and every query sees them.  In an
    encoder-decoder they have no positions by default; in self-attention, ``before`` assigns them
    the P positions before the sequence.  In a decoder-only model they always have the first P
    positions, as a cache has.
    """

    key_BPGK: Array
    value_BPGK: Array
    before: bool = field(default=False, metadata={"static": True})

    def written(self, new: "KeyValues", position: Array | int) -> "KeyValues":
        """Returns this cache with new keys and values written from ``position`` on."""

        def write(cached: Array, part: Array) -> Array:
            start = (0, position, 0, 0)
            return jax.lax.dynamic_update_slice(cached, part.astype(cached.dtype), start)

        cache: KeyValues = jax.tree.map(write, self, new)
        return cache


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

    ``layer_prompts`` has one entry per layer of the reading stack, where None means no prompt.
    ``prefixes`` has, by the name of a stack of attentions (``Model.stacks``), one entry per layer.
    In a decoder-only model ``prefix_lengths_B`` may say how many positions of the prefixes each row
    has, the first ones; the row's positions come directly behind them.  Adapters are not part of
    this class: every ``Linear`` has an ``adapter`` attribute (models/layers.py).
    ``decoder_prompt``, ``[P, D]`` or ``[B, P, D]``, comes before the decoder's start token in a
    T5, behind the encoder's output alone.
    """

    model_input: ModelInput | None = None
    layer_prompts: tuple[LayerPrompt | None, ...] | None = None
    prefixes: Mapping[str, tuple[KeyValues, ...]] = field(default_factory=dict)
    prefix_lengths_B: Array | None = None
    decoder_prompt: Array | None = None


NO_INJECTIONS = Injections()
