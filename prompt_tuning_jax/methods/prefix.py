"""Prefix tuning: trained keys and values prepended in every layer (Li and Liang 2021)."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.config.methods import PrefixTuning
from prompt_tuning_jax.methods.base import Context, TunedModel, TuningModule
from prompt_tuning_jax.methods.dense import Dense, small_param, within
from prompt_tuning_jax.models.injections import Injections, KeyValues
from prompt_tuning_jax.models.t5.attention import Attention
from prompt_tuning_jax.models.t5.model import T5
from prompt_tuning_jax.typing import Array, FlatParams, HostArray

_log = logging.getLogger(__name__)


class PlainPrefix(nnx.Module):
    """Stores the keys and values of all layers of a stack directly."""

    def __init__(self, key_LPHK: Array, value_LPHK: Array):
        axes = (None, "prompt", "heads", "kv")
        self.key_LPHK = small_param(key_LPHK, *axes)
        self.value_LPHK = small_param(value_LPHK, *axes)

    def key_value(self) -> tuple[Array, Array]:
        return self.key_LPHK.get_value(), self.value_LPHK.get_value()


class MlpPrefix(nnx.Module):
    """Computes the keys and values with an MLP from one vector per position.

    The MLP's output alternates keys and values, as in PEFT.
    """

    def __init__(self, config: PrefixTuning, model: T5, layers: int, *, key: Array):
        keys = jax.random.split(key, 3)
        shape = model.config
        width, self.heads = shape.embed_dim, (shape.num_heads, shape.head_dim)
        self.layers = layers
        self.embedding_PD = small_param(jax.random.normal(keys[0], (config.length, width)))
        self.inner = Dense(width, config.hidden, key=keys[1])
        outputs = layers * 2 * shape.num_heads * shape.head_dim
        self.outer = Dense(config.hidden, outputs, key=keys[2])

    def key_value(self) -> tuple[Array, Array]:
        made_PJ = self.outer(jnp.tanh(self.inner(self.embedding_PD.get_value())))
        made_PLXHK = made_PJ.reshape(-1, self.layers, 2, *self.heads)
        key_LPHK, value_LPHK = jnp.moveaxis(made_PLXHK, (2, 1), (0, 1))
        return key_LPHK, value_LPHK


class Prefixes(TuningModule[PrefixTuning]):
    """Injects the prefixes of the selected attentions."""

    def __init__(self, config: PrefixTuning, stacks: Mapping[str, PlainPrefix | MlpPrefix]):
        super().__init__(config)
        for name, stack in stacks.items():
            setattr(self, name, stack)

    @classmethod
    def attach(cls, config: PrefixTuning, model: T5, *, key: Array, context: Context) -> TunedModel:
        words_key, *keys = jax.random.split(key, 4)
        layers_of = _layers_of_attentions(config, model)
        if config.hidden:
            stacks = {
                name: MlpPrefix(config, model, layers, key=stack_key)
                for (name, layers), stack_key in zip(layers_of.items(), keys, strict=False)
            }
            return TunedModel(model, cls(config, stacks))
        if config.init == "words":
            tokens_P = _words(config, model, context, key=words_key)
            return with_prefixes(model, _computed(model, tokens_P, tuple(layers_of)), config)
        heads = (model.config.num_heads, model.config.head_dim)
        arrays = {}
        for (name, layers), stack_key in zip(layers_of.items(), keys, strict=False):
            key_LPHK, value_LPHK = within(stack_key, (2, layers, config.length, *heads), 0.5)
            arrays[name] = (key_LPHK, value_LPHK)
        return with_prefixes(model, arrays, config)

    def for_inference(self, model: T5) -> TunedModel:
        config = replace(self.config.as_trained(), hidden=0)
        return with_prefixes(model, {n: stack.key_value() for n, stack in self.stacks()}, config)

    def stacks(self) -> Iterator[tuple[str, PlainPrefix | MlpPrefix]]:
        """Yields the name and prefix of each selected attention."""
        for name in ("encoder", "decoder", "cross"):
            if getattr(self.config, name):
                yield name, getattr(self, name)

    def _before(self, name: str) -> bool:
        return self.config.before and name != "cross"  # cross-attention has no positions

    def injections(
        self,
        model: T5,
        tokens_BT: Array | HostArray,
        *,
        task_B: Array | HostArray | None = None,
        key: Array | None = None,
    ) -> Injections:
        prefixes: dict[str, Any] = {}
        for name, stack in self.stacks():
            pairs = zip(*stack.key_value(), strict=True)
            prefixes[f"{name}_prefixes"] = tuple(
                KeyValues(
                    key_BPHK=key_PHK[None], value_BPHK=value_PHK[None], before=self._before(name)
                )
                for key_PHK, value_PHK in pairs
            )
        return Injections(**prefixes)


def with_prefixes(
    model: T5, arrays: Mapping[str, tuple[Array, Array]], config: PrefixTuning
) -> TunedModel:
    """Attaches keys and values ``[L, P, H, K]``, given by attention name, to the model."""
    return TunedModel(model, Prefixes(config, {n: PlainPrefix(*a) for n, a in arrays.items()}))


def _layers_of_attentions(config: PrefixTuning, model: T5) -> dict[str, int]:
    """Maps each selected attention to its number of layers."""
    sizes = model.config
    layers = {
        "encoder": sizes.num_encoder_layers,
        "decoder": sizes.num_decoder_layers,
        "cross": sizes.num_decoder_layers,
    }
    return {name: number for name, number in layers.items() if getattr(config, name)}


def _words(config: PrefixTuning, model: T5, context: Context, *, key: Array) -> Array:
    """Returns ids ``[P]``: the labels' pieces, then pieces sampled from the most common ones."""
    size = model.token_embedder.table().shape[0]
    population = min(config.init_population or size, size)
    repeats = config.length > population
    sampled_P = jax.random.choice(key, population, (config.length,), replace=repeats)
    if context.vocabulary is None:
        return sampled_P
    pieces = [piece for label in context.labels for piece in context.vocabulary.encode(label)]
    if len(pieces) > config.length:
        _log.warning(
            "method.length is %d, and the labels have %d pieces: the prefix starts from the first "
            "of them; raise method.length",
            *(config.length, len(pieces)),
        )
    first = jnp.asarray(pieces[: config.length], jnp.int32)
    return sampled_P.at[: len(first)].set(first)


def _computed(model: T5, tokens_P: Array, names: tuple[str, ...]) -> dict[str, tuple[Array, Array]]:
    """Records the keys and values ``[L, P, H, K]`` that each attention computes for a text."""
    graphdef, params = param_tree.split(model)
    shape = (len(tokens_P), model.config.num_heads, model.config.head_dim)

    @jax.jit
    def run(params: FlatParams, tokens_1P: Array) -> dict[str, tuple[Array, Array]]:
        watched = param_tree.merge(graphdef, params)
        seen: dict[tuple[str, str], list[Array]] = {}

        def watch(attention: Attention, name: str) -> None:
            for part in ("key", "value"):

                def remember(x: Array, linear: Callable[[Array], Array], part: str = part) -> Array:
                    y = linear(x)
                    seen.setdefault((name, part), []).append(y.reshape(shape).astype(jnp.float32))
                    return y

                getattr(attention, part).adapter = nnx.data(remember)

        for i in range(model.config.num_encoder_layers):
            watch(watched.encoder.layer(i).attention, "encoder")
        for i in range(model.config.num_decoder_layers):
            watch(watched.decoder.layer(i).self_attention, "decoder")
            watch(watched.decoder.layer(i).encoder_decoder_attention, "cross")
        watched(tokens_1P, tokens_1P)
        return {
            name: (jnp.stack(seen[name, "key"]), jnp.stack(seen[name, "value"])) for name in names
        }

    return run(params, tokens_P[None])
