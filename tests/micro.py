"""A T5 so small that a test compiles in a second, with data and words for it."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.config.experiment import Optimizer
from prompt_tuning_jax.data.vocabularies.base import BaseVocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods import Context, MethodConfig, attach_method, trainable_mask
from prompt_tuning_jax.methods.prompt import with_prompt
from prompt_tuning_jax.models.base import Context as ModelContext
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.models.config import TokenIds
from prompt_tuning_jax.models.injections import NO_INJECTIONS, Injections, KeyValues
from prompt_tuning_jax.models.t5.config import T5Config
from prompt_tuning_jax.models.t5.model import T5
from prompt_tuning_jax.training.optim import make_optimizer, make_schedule
from prompt_tuning_jax.training.step import init_state, make_train_step

EOS = 1
T5_1_1 = T5Config(
    vocab_size=64,
    embed_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    num_encoder_layers=2,
    num_decoder_layers=2,
)
T5_1_0 = dataclasses.replace(T5_1_1, mlp_activations=("relu",), tie_embeddings=True)
PER_LAYER = dataclasses.replace(T5_1_1, relpos_per_layer=True)
ONE_LAYER = dataclasses.replace(T5_1_1, num_encoder_layers=1, num_decoder_layers=1)
D, V = T5_1_1.embed_dim, T5_1_1.vocab_size


def make_t5(config: T5Config = T5_1_1, *, seed: int = 0, **kwargs: Any) -> T5:
    """Weights from numpy (nothing to compile) that make every part matter, norms included."""
    cloned: T5 = nnx.clone(_drawn(config, seed, **kwargs))
    return cloned


@functools.cache
def _drawn(config: T5Config, seed: int, **kwargs: Any) -> T5:
    model: T5 = nnx.eval_shape(lambda: T5(config, rngs=nnx.Rngs(0), **kwargs))
    random = np.random.default_rng(seed)
    values = {}
    for name, shape in param_tree.split(model)[1].items():
        drawn = random.normal(size=shape.shape).astype(np.float32)
        if name.endswith("/scale"):
            drawn = 1 + 0.3 * drawn
        elif name.endswith("/kernel"):
            drawn = drawn * shape.shape[0] ** -0.5
        values[name] = jnp.asarray(drawn, shape.dtype)
    param_tree.fill(model, values)
    return model


def call(
    model: T5,
    source: Any,
    target: Any,
    prompt: Any = None,
    *,
    injections: Injections = NO_INJECTIONS,
    key: jax.Array | None = None,
) -> jax.Array:
    """The logits of its decoder's inputs; compiled once for all tests with the same shapes."""
    return _call(*param_tree.split(model), source, target, prompt, injections, key)


@functools.partial(jax.jit, static_argnums=0)
def _call(graphdef: Any, params: Any, source: Any, target: Any, *rest: Any) -> jax.Array:
    prompt, injections, key = rest
    return param_tree.merge(graphdef, params)(
        source, target, prompt, injections=injections, key=key
    )


def encode(
    model: T5, source: Any, prompt: Any = None, *, injections: Injections = NO_INJECTIONS
) -> ModelContext:
    """The encoder's output, likewise."""
    return _encode(*param_tree.split(model), source, prompt, injections)


@functools.partial(jax.jit, static_argnums=0)
def _encode(
    graphdef: Any, params: Any, source: Any, prompt: Any, injections: Injections
) -> ModelContext:
    context: ModelContext = param_tree.merge(graphdef, params).encode(
        source, prompt, injections=injections
    )
    return context


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(size=shape) * scale
    return drawn.astype(np.float32)


def token_rows(lengths: Sequence[int], width: int | None = None, *, seed: int = 0) -> np.ndarray:
    """Rows of these lengths, each ending in EOS, then zeros; no other EOS or zero."""
    random = np.random.default_rng(seed)
    rows = np.zeros((len(lengths), width or max(lengths)), np.int32)
    for row, length in zip(rows, lengths, strict=True):
        if length:
            row[:length] = [*random.integers(2, V, length - 1), EOS]
    return rows


def shifted(targets: np.ndarray) -> np.ndarray:
    """Decoder inputs of targets ``[..., S]``."""
    return np.concatenate([np.zeros_like(targets[..., :1]), targets[..., :-1]], axis=-1)


def make_batch(members: int = 1, rows: int = 4, *, seed: int = 0) -> dict[str, np.ndarray]:
    """A training batch ``[E, B, ...]`` of inputs and targets of unequal lengths."""
    random = np.random.default_rng(1000 + seed)
    inputs = [
        token_rows(random.integers(2, 8, rows), 7, seed=seed * 50 + e) for e in range(members)
    ]
    targets = [
        token_rows(random.integers(1, 5, rows), 4, seed=seed * 50 + 25 + e) for e in range(members)
    ]
    return {"inputs": np.stack(inputs), "targets": np.stack(targets)}


def make_prefixes(
    config: T5Config, *, layers: int, batch: int = 1, length: int = 3, seed: int = 0
) -> tuple[KeyValues, ...]:
    shape = (layers, 2, batch, length, config.num_heads, config.head_dim)
    drawn = jnp.asarray(normal(*shape, seed=seed))
    return tuple(KeyValues(key_BPGK=key, value_BPGK=value) for key, value in drawn)


class Trainer:
    """E members of one method on the micro T5: their state, the frozen weights, the step."""

    def __init__(
        self,
        method: MethodConfig,
        optimizer: Optimizer,
        prompts: Iterable[np.ndarray] | None = None,
        *,
        model: Model | None = None,
        context: Context | None = None,
        seeds: tuple[int, ...] = (0,),
        learning_rates: tuple[float, ...] | None = None,
        total_steps: int = 10,
        **kwargs: Any,
    ):
        """``prompts`` are the members' initial values; without them the method draws one."""
        model = model or make_t5()
        if prompts is None:
            context = context or Context()
            attached = [attach_method(model, method, key=jax.random.key(0), context=context)]
        else:
            attached = [with_prompt(model, prompt, method) for prompt in prompts]
        self.graphdef, params = param_tree.split(attached[0])
        self.mask = trainable_mask(method, list(params))
        _, self.frozen = param_tree.partition(params, self.mask)
        trainable = [param_tree.partition(param_tree.split(a)[1], self.mask)[0] for a in attached]
        stacked = {
            name: jnp.stack([jnp.asarray(t[name]) for t in trainable]) for name in trainable[0]
        }
        self.optimizer, self.step = _optimizer_and_step(
            self.graphdef,
            optimizer,
            tuple(self.mask.items()),
            total_steps,
            learning_rates or (optimizer.learning_rate,) * len(seeds),
            seeds,
            **kwargs,
        )
        self.state = init_state(stacked, self.optimizer)

    def run(self, batches: Iterable[dict[str, np.ndarray]]) -> list[Any]:
        """Trains on the batches; the metrics of every step."""
        metrics = []
        for batch in batches:
            self.state, measured = self.step(self.state, self.frozen, batch)
            metrics.append(measured)
        return metrics


@functools.cache
def _optimizer_and_step(
    graphdef: Any,
    optimizer: Optimizer,
    mask: tuple[tuple[str, bool], ...],
    total_steps: int,
    learning_rates: tuple[float, ...],
    seeds: tuple[int, ...],
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Compiled once for all tests that train in the same way."""
    built = make_optimizer(optimizer, dict(mask))
    schedule = make_schedule(optimizer, total_steps=total_steps)
    step = make_train_step(
        graphdef, built, schedule, learning_rates=learning_rates, seeds=seeds, **kwargs
    )
    return built, step


class Words(BaseVocabulary):
    """A vocabulary whose words have the ids from 2 on, by the sum of their letters."""

    size = V
    eos_id = EOS
    fingerprint = "words"

    def __init__(self, token_ids: TokenIds | None = None):
        self.token_ids = token_ids or TokenIds()

    def encode(self, text: str) -> list[int]:
        return [2 + sum(map(ord, word)) % (V - 2) for word in text.split()]

    def encode_batch(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        kept = list(itertools.takewhile(lambda i: i not in self.token_ids.all_eos, ids))
        return " ".join(f"w{i}" for i in kept if i)

    def pieces(self, token_id: int) -> str:
        return f"w{token_id}"

    def sentinel(self, index: int) -> int:
        raise UserError(f"there is no sentinel {index}")
