"""Prefix tuning: trained keys and values in front of every layer's own (Li and Liang 2021)."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods.base import Context, Method, TunedModel, TuningModule
from prompt_tuning_jax.methods.dense import Dense, small_param, within
from prompt_tuning_jax.models.injections import Injections, KeyValues
from prompt_tuning_jax.models.t5.attention import Attention
from prompt_tuning_jax.models.t5.model import T5
from prompt_tuning_jax.typing import Array, FlatParams, HostArray

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(Method):
    """``2 * length * H * K * L`` parameters, L being the layers of the chosen attentions together.

    Chosen are the encoder's self-attention (``encoder``), the decoder's (``decoder``) and
    cross-attention (``cross``).  With ``hidden`` M above 0 each of these, of L layers, is made in
    training by an MLP over vectors of the model's width D, which is folded away in what is kept
    (section 4.3): ``length * D + (D + 1) * M + (M + 1) * 2 * L * H * K`` parameters.

    Prefixes have no positions, or with ``before`` those before the sequence, as in PEFT.

    ``init``: ``words`` starts from what the model computes for the task's labels and sampled common
    pieces (section 7.4), ``uniform`` draws within 0.5; an MLP starts as torch's layers do.
    """

    default_optimizer: ClassVar[Mapping[str, Any]] = {"learning_rate": 0.1}

    length: int = 20
    encoder: bool = True
    decoder: bool = True
    cross: bool = True
    before: bool = False
    hidden: int = 0
    init: Literal["words", "uniform"] = "words"
    init_population: int = 5000

    def attach(self, model: T5, *, key: Array, context: Context) -> TunedModel:
        if not any((self.encoder, self.decoder, self.cross)):
            raise UserError(
                "method.encoder, method.decoder and method.cross are all false; choose one at least"
            )
        words_key, *keys = jax.random.split(key, 4)
        if self.hidden:
            made = {
                name: MlpPrefix(self, model, layers, key=own_key)
                for (name, layers), own_key in zip(self._stacks(model), keys, strict=False)
            }
            return TunedModel(model, Prefixes(self, made))
        if self.init == "words":
            tokens_P = _words(self, model, context, key=words_key)
            names = tuple(name for name, _ in self._stacks(model))
            return self.with_prefixes(model, _computed(model, tokens_P, names))
        heads = (model.config.num_heads, model.config.head_dim)
        drawn = {
            name: within(own_key, (2, layers, self.length, *heads), 0.5)
            for (name, layers), own_key in zip(self._stacks(model), keys, strict=False)
        }
        return self.with_prefixes(model, {name: (own[0], own[1]) for name, own in drawn.items()})

    def for_inference(self, attached: TunedModel) -> tuple[Method, TunedModel]:
        method = replace(self, hidden=0, init="uniform")
        prefixes = attached.method
        assert isinstance(prefixes, Prefixes)
        arrays = {name: stack.key_value() for name, stack in prefixes.stacks()}
        return method, method.with_prefixes(attached.model, arrays)

    def with_prefixes(self, model: T5, arrays: Mapping[str, tuple[Array, Array]]) -> TunedModel:
        """The model with these keys and values ``[L, P, H, K]`` by attention."""
        return TunedModel(model, Prefixes(self, {n: PlainPrefix(*a) for n, a in arrays.items()}))

    def _stacks(self, model: T5) -> Iterator[tuple[str, int]]:
        """The chosen attentions and the number of their layers."""
        config = model.config
        for name, layers in (
            ("encoder", config.num_encoder_layers),
            ("decoder", config.num_decoder_layers),
            ("cross", config.num_decoder_layers),
        ):
            if getattr(self, name):
                yield name, layers


class PlainPrefix(nnx.Module):
    """The keys and values of a stack's layers themselves."""

    def __init__(self, key_LPHK: Array, value_LPHK: Array):
        axes = (None, "prompt", "heads", "kv")
        self.key_LPHK = small_param(key_LPHK, *axes)
        self.value_LPHK = small_param(value_LPHK, *axes)

    def key_value(self) -> tuple[Array, Array]:
        return self.key_LPHK.get_value(), self.value_LPHK.get_value()


class MlpPrefix(nnx.Module):
    """Makes them of one vector per position; laid out as in PEFT: keys and values by turns."""

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


class Prefixes(TuningModule):
    """Puts the prefixes of the chosen attentions into their slots."""

    def __init__(self, config: PrefixTuning, stacks: Mapping[str, PlainPrefix | MlpPrefix]):
        self.config = config
        for name, stack in stacks.items():
            setattr(self, name, stack)

    def stacks(self) -> Iterator[tuple[str, PlainPrefix | MlpPrefix]]:
        """The chosen attentions and their prefixes."""
        for name in ("encoder", "decoder", "cross"):
            if getattr(self.config, name):
                yield name, getattr(self, name)

    def _before(self, name: str) -> bool:
        return self.config.before and name != "cross"  # cross-attention knows no positions

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


def _words(method: PrefixTuning, model: T5, context: Context, *, key: Array) -> Array:
    """Ids ``[P]``: the pieces of the labels, then sampled ones of the most common."""
    size = model.token_embedder.table().shape[0]
    population = min(method.init_population or size, size)
    repeats = method.length > population
    sampled_P = jax.random.choice(key, population, (method.length,), replace=repeats)
    if context.vocabulary is None:
        return sampled_P
    pieces = [piece for label in context.labels for piece in context.vocabulary.encode(label)]
    if len(pieces) > method.length:
        _log.warning(
            "method.length is %d, and the labels have %d pieces: the prefix starts from the first "
            "of them; raise method.length",
            *(method.length, len(pieces)),
        )
    first = jnp.asarray(pieces[: method.length], jnp.int32)
    return sampled_P.at[: len(first)].set(first)


def _computed(model: T5, tokens_P: Array, names: tuple[str, ...]) -> dict[str, tuple[Array, Array]]:
    """The keys and values ``[L, P, H, K]`` that these attentions compute for a text."""
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
