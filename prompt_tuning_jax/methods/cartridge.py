"""Cartridges: a prefix that starts as the keys and values of a text (Eyuboglu et al. 2025)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax.config.methods import Cartridge, PrefixTuning
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods.base import Context, TunedModel, TuningModule
from prompt_tuning_jax.methods.dense import within
from prompt_tuning_jax.methods.prefix import (
    PlainPrefix,
    initial_words,
    keys_values_of,
    prefix_injections,
    with_prefixes,
)
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.models.injections import Injections
from prompt_tuning_jax.typing import Array, FlatParams, HostArray


class CartridgePrefix(TuningModule[Cartridge]):
    """Injects the prefixes of all attentions; the first positions keep their initial values."""

    def __init__(self, config: Cartridge, arrays: Mapping[str, tuple[Array, Array]]):
        super().__init__(config)
        self.stacks = nnx.data({name: PlainPrefix(*pair) for name, pair in arrays.items()})

    @classmethod
    def attach(cls, config: Cartridge, model: Model, *, key: Array, context: Context) -> TunedModel:
        if config.init != "uniform":
            if config.init == "words":
                tokens_P = initial_words(config, model, context, key=key)
            else:
                tokens_P = _first_tokens(config, model, context)
            return TunedModel(model, cls(config, keys_values_of(model, tokens_P)))
        arrays = {}
        for number, (name, stack) in enumerate(model.stacks.items()):
            shape = (stack.num_layers, config.length, stack.num_kv_heads, stack.head_dim)
            key_LPHK, value_LPHK = within(jax.random.fold_in(key, number), (2, *shape), 0.5)
            arrays[name] = (key_LPHK, value_LPHK)
        return TunedModel(model, cls(config, arrays))

    def for_inference(self, model: Model) -> TunedModel:
        config = PrefixTuning(length=self.config.length, before=True)
        return with_prefixes(model, self._arrays(), config.as_trained())

    def injections(
        self,
        model: Model,
        tokens_BT: Array | HostArray,
        *,
        task_B: Array | HostArray | None = None,
        key: Array | None = None,
    ) -> Injections:
        fixed = self.config.frozen

        def with_fixed(array_LPHK: Array) -> Array:
            first = jax.lax.stop_gradient(array_LPHK[:, :fixed])
            return jnp.concatenate([first, array_LPHK[:, fixed:]], axis=1)

        arrays = {
            name: (with_fixed(keys), with_fixed(values))
            for name, (keys, values) in self._arrays().items()
        }
        return prefix_injections(arrays, before=True)

    # Weight decay would move positions that have no gradient.
    def constrained(self, before: FlatParams, after: FlatParams) -> FlatParams:
        fixed = self.config.frozen
        return {
            name: jnp.concatenate([before[name][:, :fixed], array[:, fixed:]], axis=1)
            for name, array in after.items()
        }

    def _arrays(self) -> dict[str, tuple[Array, Array]]:
        return {name: prefix.key_value() for name, prefix in self.stacks.items()}


def _first_tokens(config: Cartridge, model: Model, context: Context) -> Array:
    """Returns ids ``[P]``: the beginning of the text, behind the tokens that begin every input."""
    vocabulary = context.vocabulary or model.vocabulary
    if vocabulary is None:
        raise UserError("method.init=text needs the model's vocabulary; set model.vocabulary")
    text = context.init_text or config.init_text
    tokens = [*vocabulary.input_start, *vocabulary.encode(text)]
    if len(tokens) < config.length:
        raise UserError(
            f"method.init=text: the text has {len(tokens)} tokens, and method.length is "
            f"{config.length}; set method.length to at most {len(tokens)}, or give a longer text"
        )
    return jnp.asarray(tokens[: config.length], jnp.int32)
