"""A family of models in one file: reading and writing share one layer of attention."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax.models import base
from prompt_tuning_jax.models.config import ModelConfig
from prompt_tuning_jax.models.injections import NO_INJECTIONS, Injections, KeyValues, ModelInput
from prompt_tuning_jax.models.layers import Embed, Linear
from prompt_tuning_jax.typing import Array


@dataclass(frozen=True, kw_only=True)
class ToyConfig(ModelConfig):
    implementation: ClassVar[str] = "tests.toy_family:Toy"
    num_reading_layers: ClassVar[int] = 1  # type: ignore[misc]


class Toy(base.Model):
    """Each target attends to what was read and, under the same softmax, to those before it."""

    reading_stack, causal = "shared", False

    def __init__(self, config: ToyConfig, *, rngs: nnx.Rngs, vocabulary: Any = None):
        super().__init__(config, dtype=jnp.float32, vocabulary=vocabulary)
        kind: dict[str, Any] = {"dtype": jnp.float32, "param_dtype": jnp.float32, "rngs": rngs}
        width, axes = config.embed_dim, ("embed", "embed")
        self.token_embedder = Embed(config, **kind)
        for name in ("query", "key", "value", "out"):  # as wide as all heads together
            setattr(self, name, Linear(width, width, axes=axes, std=0.5, **kind))

    @property
    def stacks(self) -> dict[str, base.AttentionStack]:
        heads, size = self.config.num_heads, self.config.head_dim
        return {"shared": base.AttentionStack(num_layers=1, num_kv_heads=heads, head_dim=size)}

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], self.config.num_heads, -1)

    def _keys_values(self, x: Array) -> KeyValues:
        return KeyValues(key_BPGK=self._heads(self.key(x)), value_BPGK=self._heads(self.value(x)))

    def _attend(self, x_BSD, parts, to: Injections) -> Array:
        """Attends to keys and values, each with a mask of where they are seen, behind prefixes."""
        prefix = [(kv, jnp.ones((1, 1, 1), bool)) for kv in to.prefixes.get("shared", ())]
        keys, values, masks = [], [], []
        for kv, seen_BSU in [*prefix, *parts]:
            size = (len(x_BSD), *kv.key_BPGK.shape[1:])  # a prefix may be the same for all rows
            keys.append(jnp.broadcast_to(kv.key_BPGK, size))
            values.append(jnp.broadcast_to(kv.value_BPGK, size))
            masks.append(jnp.broadcast_to(seen_BSU, (*x_BSD.shape[:2], size[1])))
        whole = (jnp.concatenate(x, axis=1) for x in (keys, values))
        seen_B1SU = jnp.concatenate(masks, axis=2)[:, None]
        query_BSHK = self._heads(self.query(x_BSD))
        mixed = jax.nn.dot_product_attention(query_BSHK, *whole, mask=seen_B1SU)
        return jnp.tanh(x_BSD / 4 + self.out(mixed.reshape(x_BSD.shape)))

    def read(self, source: ModelInput, *, injections=NO_INJECTIONS, key=None, remat="none"):
        source = base.joined(source)
        x_BUD, seen_BUU = source.embeddings_BUD, source.mask_BU[:, None]
        seen_BUU &= True if source.attention_mask_BUU is None else source.attention_mask_BUU
        hidden_BUD = self._attend(x_BUD, [(self._keys_values(x_BUD), seen_BUU)], injections)
        kept = {"mask_BU": source.mask_BU, "keys_values": (self._keys_values(hidden_BUD),)}
        return base.Context(hidden_BUD=hidden_BUD, **kept)

    def write_hidden(self, context, targets, *, injections=NO_INJECTIONS, key=None, remat="none"):
        start_B1 = jnp.full((len(targets), 1), self.token_ids.start)
        x_BSD = self.embed_tokens(jnp.concatenate([start_B1, targets[:, :-1]], axis=1))
        read = (context.keys_values[0], context.mask_BU[:, None])
        own = (self._keys_values(x_BSD), jnp.tri(x_BSD.shape[1], dtype=bool)[None])
        return self._attend(x_BSD, [read, own], injections)

    def decode_step(self, tokens_B, position, caches, context, *, injections=NO_INJECTIONS):
        x_B1D = self.embed_tokens(tokens_B[:, None])
        own = caches[0].written(self._keys_values(x_B1D), position)
        written_11S = jnp.arange(own.key_BPGK.shape[1])[None, None] <= position
        parts = [(context.keys_values[0], context.mask_BU[:, None]), (own, written_11S)]
        logits_BV = self.logits(self._attend(x_B1D, parts, injections))[:, 0]
        return logits_BV, (own,)

    def logits(self, hidden: Array) -> Array:
        return self.token_embedder.attend(hidden)

    def output_vectors(self, tokens_N) -> Array:
        return self.token_embedder.table()[tokens_N].astype(jnp.float32)

    def keys_values_of(self, tokens_P: Array) -> dict[str, tuple[Array, Array]]:
        made = self._keys_values(self.embed_tokens(tokens_P)[None])  # of the only layer
        return {"shared": (made.key_BPGK, made.value_BPGK)}
