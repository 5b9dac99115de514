"""Prefix tuning: trained keys and values prepended in every layer (Li and Liang 2021)."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.config.methods import Cartridge, PrefixTuning
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods.base import Context, TunedModel, TuningModule
from prompt_tuning_jax.methods.dense import Dense, small_param, within
from prompt_tuning_jax.models.base import AttentionStack, Model
from prompt_tuning_jax.models.injections import Injections, KeyValues
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

    def __init__(self, config: PrefixTuning, stack: AttentionStack, width: int, *, key: Array):
        keys = jax.random.split(key, 3)
        self.heads = (stack.num_kv_heads, stack.head_dim)
        self.layers = stack.num_layers
        self.embedding_PD = small_param(jax.random.normal(keys[0], (config.length, width)))
        self.inner = Dense(width, config.hidden, key=keys[1])
        outputs = stack.num_layers * 2 * stack.num_kv_heads * stack.head_dim
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
        self.names = tuple(stacks)
        for name, stack in stacks.items():
            setattr(self, name, stack)

    @classmethod
    def attach(
        cls, config: PrefixTuning, model: Model, *, key: Array, context: Context
    ) -> TunedModel:
        words_key, *keys = jax.random.split(key, 4)
        stacks = _chosen(config, model)
        if config.hidden:
            width = model.config.embed_dim
            made = {
                name: MlpPrefix(config, stack, width, key=stack_key)
                for (name, stack), stack_key in zip(stacks.items(), keys, strict=False)
            }
            return TunedModel(model, cls(config, made))
        if config.init == "words":
            computed = keys_values_of(model, initial_words(config, model, context, key=words_key))
            return with_prefixes(model, {name: computed[name] for name in stacks}, config)
        arrays = {}
        for (name, stack), stack_key in zip(stacks.items(), keys, strict=False):
            shape = (stack.num_layers, config.length, stack.num_kv_heads, stack.head_dim)
            key_LPHK, value_LPHK = within(stack_key, (2, *shape), 0.5)
            arrays[name] = (key_LPHK, value_LPHK)
        return with_prefixes(model, arrays, config)

    def for_inference(self, model: Model) -> TunedModel:
        config = replace(self.config.as_trained(), hidden=0)
        return with_prefixes(model, {n: stack.key_value() for n, stack in self.stacks()}, config)

    def stacks(self) -> Iterator[tuple[str, PlainPrefix | MlpPrefix]]:
        """Yields the name and prefix of each selected attention."""
        for name in self.names:
            yield name, getattr(self, name)

    def injections(
        self,
        model: Model,
        tokens_BT: Array | HostArray,
        *,
        task_B: Array | HostArray | None = None,
        key: Array | None = None,
    ) -> Injections:
        arrays = {name: stack.key_value() for name, stack in self.stacks()}
        return prefix_injections(arrays, before=self.config.before)


def prefix_injections(
    arrays: Mapping[str, tuple[Array, Array]], *, before: bool = False
) -> Injections:
    """Injects keys and values ``[L, P, H, K]``, given by attention name, for all rows.

    ``before`` gives them the positions before the sequence, which cross-attention does not have.
    """
    prefixes = {
        name: tuple(
            KeyValues(
                key_BPGK=key_PHK[None],
                value_BPGK=value_PHK[None],
                before=before and name != "cross",
            )
            for key_PHK, value_PHK in zip(*pair, strict=True)
        )
        for name, pair in arrays.items()
    }
    return Injections(prefixes=prefixes)


def with_prefixes(
    model: Model, arrays: Mapping[str, tuple[Array, Array]], config: PrefixTuning
) -> TunedModel:
    """Attaches keys and values ``[L, P, H, K]``, given by attention name, to the model."""
    return TunedModel(model, Prefixes(config, {n: PlainPrefix(*a) for n, a in arrays.items()}))


def keys_values_of(model: Model, tokens_P: Array) -> dict[str, tuple[Array, Array]]:
    """Does ``Model.keys_values_of``, compiled once for all members of a run."""
    return _compiled_keys_values(*param_tree.split(model), tokens_P)


@partial(jax.jit, static_argnums=0)
def _compiled_keys_values(
    graphdef: nnx.GraphDef[Model], params: FlatParams, tokens_P: Array
) -> dict[str, tuple[Array, Array]]:
    model: Model = param_tree.merge(graphdef, params)
    return model.keys_values_of(tokens_P)


def _chosen(config: PrefixTuning, model: Model) -> dict[str, AttentionStack]:
    """Returns the selected attentions of the model; raises UserError if it has none of them."""
    chosen = {name: stack for name, stack in model.stacks.items() if config.chooses(name)}
    if not chosen:
        raise UserError(
            f"method=prefix_tuning: none of the model's attentions ({', '.join(model.stacks)}) is "
            f"chosen; set method.{next(iter(model.stacks))}=true"
        )
    return chosen


def initial_words(
    config: PrefixTuning | Cartridge, model: Model, context: Context, *, key: Array
) -> Array:
    """Returns ids ``[P]``: the labels' pieces, then pieces sampled from the most common ones."""
    size = model.embedding_table().shape[0]
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
