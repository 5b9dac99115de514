"""Logits a part of the vocabulary at a time: the same loss and derivatives, and no large array."""

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.methods import LoRA, attach_method
from prompt_tuning_jax.methods.base import Context
from prompt_tuning_jax.models.layers import Embed, Linear
from prompt_tuning_jax.models.losses import token_sums
from prompt_tuning_jax.models.output_head import LazyLogits, OutputHead
from prompt_tuning_jax.models.quantization import QuantizedEmbed, QuantizedLinear, quantize
from tests.devices import with_devices
from tests.micro import EOS, make_batch, make_t5, normal
from tests.toy_family import Toy, ToyConfig

V, D = 101, 32  # the last part repeats words of the one before it
TARGETS = np.random.default_rng(1).integers(0, V, (3, 5))
TARGETS[1, 3:] = -1
SMALL_MB = 4 * 15 * 20 / 1e6  # twenty words of all targets


class Sizes:
    vocab_size, embed_dim = V, D


def layers() -> dict[str, Any]:
    kind: dict[str, Any] = {
        "dtype": jnp.float32,
        "param_dtype": jnp.float32,
        "rngs": nnx.Rngs(0),
        "std": 0.3,
    }
    table = Embed(Sizes, **kind)  # type: ignore[arg-type]
    linear = Linear(D, V, axes=("embed", "vocab"), use_bias=True, out_dtype=jnp.float32, **kind)
    linear.bias.set_value(jnp.asarray(normal(V)))
    rows, scale = quantize(table.embedding.get_value().T, "int8")
    return {
        "tied": table,
        "untied": linear,
        "tied int8": QuantizedEmbed(table, rows.T, scale.T),
        "untied int4": QuantizedLinear(linear, *quantize(linear.kernel.get_value(), "int4")),
    }


def loss(graphdef: Any, params: Any, hidden: jax.Array, cap: float, mb: float) -> Any:
    head = OutputHead(layer=param_tree.merge(graphdef, params), vocab_size=V, cap=cap, scale=0.9)
    lazy = LazyLogits(hidden=hidden, head=head, max_mb=mb)
    sums = token_sums(lazy, TARGETS, z_loss=0.1, padding=-1, weights_B=np.array([1, 2, 0.5]))
    return sums.loss, sums


@pytest.mark.parametrize(
    ("name", "cap"), [("tied", 0.0), ("untied", 2.0), ("tied int8", 2.0), ("untied int4", 0.0)]
)
def test_parts_of_the_vocabulary_have_the_loss_and_derivatives_of_all(
    name: str, cap: float
) -> None:
    graphdef, params = param_tree.split(layers()[name])
    hidden = jnp.asarray(normal(3, 5, D))
    trained = {n: p for n, p in params.items() if p.dtype == jnp.float32 and "int" not in name}
    frozen = {n: p for n, p in params.items() if n not in trained}

    def derive(mb: float) -> Any:
        def of(trained: Any, hidden: jax.Array) -> Any:
            return loss(graphdef, {**frozen, **trained}, hidden, cap, mb)

        return jax.jit(jax.value_and_grad(of, (0, 1), has_aux=True))(trained, hidden)

    (_, want), plain = derive(64)
    (_, sums), parts = derive(SMALL_MB)
    for field in ("loss", "tokens", "examples", "correct"):
        np.testing.assert_allclose(getattr(sums, field), getattr(want, field), rtol=1e-5)
    assert jax.tree.structure(parts) == jax.tree.structure(plain)
    for got, expected in zip(jax.tree.leaves(parts), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


def test_the_best_word_is_the_first_of_equals_and_a_right_one_is_counted() -> None:
    graphdef, params = param_tree.split(layers()["untied"])
    params = {name: jnp.zeros_like(p) for name, p in params.items()}
    params["bias"] = params["bias"].at[jnp.asarray([70, 99])].set(3.0)
    head = OutputHead(layer=param_tree.merge(graphdef, params), vocab_size=V)
    targets = np.array([[70, 70], [99, 70]])
    lazy = LazyLogits(hidden=jnp.ones((2, 2, D)), head=head, max_mb=4 * 4 * 20 / 1e6)
    assert (np.asarray(lazy.statistics(targets).best) == 70).all()
    assert float(token_sums(lazy, targets, padding=-1).correct) == 1


def arrays_of(jaxpr: Any) -> Iterator[Any]:
    """Every array that a function computes, those of loops included."""
    for equation in jaxpr.eqns:
        yield from (v.aval for v in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from arrays_of(inner)


@pytest.mark.parametrize("members", [1, 3])
def test_no_array_has_all_words_of_all_targets(members: int) -> None:
    """Nor the derivative of a frozen head."""
    graphdef, params = param_tree.split(layers()["tied"])

    def total(hidden: jax.Array, mb: float) -> jax.Array:
        head = OutputHead(layer=param_tree.merge(graphdef, params), vocab_size=V)
        lazy = LazyLogits(hidden=hidden, head=head, max_mb=mb, copies=members)
        return token_sums(lazy, TARGETS, padding=-1).loss

    def largest(mb: float) -> int:
        derive = jax.vmap(jax.grad(lambda hidden: total(hidden, mb)))
        jaxpr = jax.make_jaxpr(derive)(jnp.zeros((members, 3, 5, D)))
        return max(math.prod(a.shape) for a in arrays_of(jaxpr.jaxpr) if a.dtype == jnp.float32)

    assert largest(64) >= members * 15 * V
    bound = SMALL_MB * members
    part_of_the_table = 20 * D
    assert largest(bound) <= max(bound * 1e6 / 4, members * 15 * D, part_of_the_table)


def test_an_adapted_head_and_an_unknown_one_take_some_targets_at_a_time() -> None:
    """An adapter may mix the words, and then each part has all of them."""
    model = make_t5()
    lora = LoRA(rank=2, targets=("decoder/logits_dense",))
    tuned = attach_method(model, lora, key=jax.random.key(0), context=Context())
    graphdef, params = param_tree.split(tuned)
    trained = {n: p + 0.1 for n, p in params.items() if "/adapter/" in n}
    batch = {name: x[0] for name, x in make_batch().items()}

    def derive(mb: float) -> Any:
        def of(trained: Any) -> jax.Array:
            attached = param_tree.merge(graphdef, {**params, **trained})
            attached.model.logits_mb = mb
            return attached.token_sums(batch["inputs"], batch["targets"], z_loss=0.1).loss

        return jax.jit(jax.value_and_grad(of))(trained)

    plain, parts = derive(64), derive(4 * 64 * 3 / 1e6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, parts)
    sizes: dict[str, Any] = {"num_heads": 2, "head_dim": 8, "mlp_dim": 32}
    toy = Toy(ToyConfig(vocab_size=64, embed_dim=16, **sizes), rngs=nnx.Rngs(0))
    lazy = toy.lazy_logits(jnp.asarray(normal(2, 3, 16)))
    targets = np.array([[4, 5, EOS], [63, EOS, 0]])
    want, got = (replace(lazy, max_mb=mb).statistics(targets) for mb in (64, 1e-3))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), want, got)


EIGHT_DEVICES = """
from dataclasses import replace
import jax, numpy as np
from prompt_tuning_jax.distributed.sharding import Partitioner, activation_sharding, make_mesh
from prompt_tuning_jax import param_tree
from prompt_tuning_jax.models.losses import token_sums
from tests.micro import ONE_LAYER, make_batch, make_t5

partitioner = Partitioner(mesh=make_mesh(data=2, fsdp=2, model=2))
for tied in (True, False):
    model = make_t5(replace(ONE_LAYER, tie_embeddings=tied))
    graphdef, params = param_tree.split(model)
    batch = {name: np.tile(x[0], (4, 1))[:8] for name, x in make_batch(8).items()}

    def loss(params, batch, mb, on):
        with activation_sharding(on):
            model = param_tree.merge(graphdef, params)
            hidden = model.run_hidden(batch["inputs"], batch["targets"])
            model.logits_mb = mb
            return token_sums(model.lazy_logits(hidden), batch["targets"]).loss

    derive = jax.jit(jax.value_and_grad(loss), static_argnums=(2, 3))
    want = derive(params, batch, 64, None)
    spread = partitioner.shard(params, param_tree.logical_axes(model))
    rows = partitioner.shard_batch(batch, ("batch", "length"))
    got = derive(spread, rows, 4 * 2 * 6 * 5 / 1e6, partitioner)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, jax.device_get(want), jax.device_get(got))
print("fine")
"""


def test_a_sharded_vocabulary_gives_each_device_its_words() -> None:
    done = subprocess.run(
        [sys.executable, "-c", EIGHT_DEVICES],
        cwd=Path(__file__).resolve().parents[2],
        env=with_devices(8),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "fine" in done.stdout, done.stderr
