"""The attention kernel, simulated, against plain attention."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.config.experiment import Experiment, Model
from prompt_tuning_jax.config.validation import validate
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.setup import build_model
from prompt_tuning_jax.methods import FullTuning
from prompt_tuning_jax.models.injections import Injections
from prompt_tuning_jax.models.ops import fused_attention as kernel
from prompt_tuning_jax.models.ops.attention import MASK_VALUE
from prompt_tuning_jax.models.t5 import encoder as t5_encoder
from tests import micro
from tests.devices import with_devices
from tests.micro import normal

H, K = 4, 8


def operands(rows: int, queries: int, keys: int, groups: int, dtype: Any) -> dict[str, Any]:
    random = np.random.default_rng(queries)
    mask_BU = random.random((rows, keys)) < 0.7
    mask_BU[0] = False  # a row that sees no key
    return {
        "query_BTHK": jnp.asarray(normal(rows, queries, H, K, seed=1), dtype),
        "key_BUGK": jnp.asarray(normal(rows, keys, groups, K, seed=2), dtype),
        "value_BUGK": jnp.asarray(normal(rows, keys, groups, K, seed=3), dtype),
        "bias_HN": jnp.asarray(normal(H, queries + keys - 1, seed=4)),
        "mask_BU": jnp.asarray(mask_BU),
        "keep_TU": jnp.asarray((random.random((queries, keys)) < 0.8) / 0.8, jnp.float32),
    }


def plain(query_BTHK: Any, key_BUGK: Any, value_BUGK: Any, **rest: Any) -> jax.Array:
    """Attention by its definition, in float32."""
    query, key, value = (x.astype(jnp.float32) for x in (query_BTHK, key_BUGK, value_BUGK))
    key, value = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (key, value))
    queries, keys = query.shape[1], key.shape[1]
    distance = np.arange(keys)[None] - np.arange(queries)[:, None]
    scores = jnp.einsum("bthk,buhk->bhtu", query, key)
    scores += rest["bias_HN"][:, distance + queries - 1]
    scores += jnp.where(rest["mask_BU"], 0.0, MASK_VALUE)[:, None, None]
    weights = jax.nn.softmax(scores) * rest["keep_TU"]
    return jnp.einsum("bhtu,buhk->bthk", weights, value)


def with_gradients(attend: Any, values: dict[str, Any]) -> list[jax.Array]:
    """The result, and the gradients of queries, keys and values."""
    inputs = {name: x for name, x in values.items() if name.endswith("K")}
    rest = {name: x for name, x in values.items() if name not in inputs}

    @jax.jit
    def run(inputs: Any, rest: Any) -> Any:
        def loss(inputs: Any) -> Any:
            out = attend(**inputs, **rest).astype(jnp.float32)
            return jnp.sum(out * jnp.sin(jnp.arange(out.size).reshape(out.shape))), out

        gradients, out = jax.grad(loss, has_aux=True)(inputs)
        return out, *gradients.values()

    return list(run(inputs, rest))


@pytest.mark.parametrize(
    ("shape", "dtype", "tolerance"),
    [
        ((2, 5, 9, H), jnp.float32, 2e-6),
        ((2, 7, 7, 2), jnp.float32, 2e-6),  # two heads share keys
        ((1, 130, 260, H), jnp.bfloat16, 3e-2),  # two blocks of queries, three of keys
    ],
)
def test_the_kernel_is_attention(
    shape: tuple[int, ...], dtype: Any, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "_MOST_SCORES", 128 * 384)
    values = operands(*shape, dtype)
    wanted, got = with_gradients(plain, values), with_gradients(kernel.fused_attention, values)
    for one, other in zip(wanted, got, strict=True):
        np.testing.assert_allclose(
            np.asarray(other, np.float32), np.asarray(one, np.float32), atol=tolerance * 4
        )


def test_chips_without_strided_rolls_get_the_same_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    x = jnp.asarray(normal(24, 128))
    strided, stepwise = [], []
    for rolled, has in ((strided, True), (stepwise, False)):
        monkeypatch.setattr(kernel, "has_strided_rolls", lambda has=has: has)
        rolled.append(jax.jit(lambda x: kernel._rolled(x, 5))(x))
    np.testing.assert_array_equal(strided[0], stepwise[0])
    np.testing.assert_array_equal(strided[0][3], np.roll(np.asarray(x)[3], 8))


def test_the_bias_has_no_derivative() -> None:
    values = operands(1, 2, 3, H, jnp.float32)

    def loss(bias_HN: Any) -> Any:
        return jnp.sum(kernel.fused_attention(**{**values, "bias_HN": bias_HN}))

    with pytest.raises(NotImplementedError, match="bias"):
        jax.grad(loss)(values["bias_HN"])


ON_A_MESH = """
import jax, jax.numpy as jnp, numpy as np
from prompt_tuning_jax import param_tree
from prompt_tuning_jax.distributed import sharding
from prompt_tuning_jax.distributed.sharding import Partitioner, activation_sharding, make_mesh
from prompt_tuning_jax.models.ops.fused_attention import fused_attention
from tests import micro
from tests.devices import with_devices
from tests.models.test_fused_attention import operands, plain, with_gradients

partitioner = Partitioner(mesh=make_mesh(data=2, model=2))
values = operands(4, 3, 5, 2, jnp.float32)

def on_mesh(**values):
    with activation_sharding(partitioner):
        return fused_attention(**values)

for one, other in zip(with_gradients(plain, values), with_gradients(on_mesh, values), strict=True):
    np.testing.assert_allclose(other, one, atol=1e-5)

model = micro.make_t5()
params = partitioner.shard(param_tree.split(model)[1], param_tree.logical_axes(model))
stacked = param_tree.stack_layers(dict(params), sharding.stack)
kernel = stacked["encoder/layers/mlp/wo/kernel"]
assert kernel.sharding.spec == jax.P(None, "model", "fsdp"), kernel.sharding
np.testing.assert_array_equal(kernel[1], params["encoder/layers_1/mlp/wo/kernel"])
"""


def test_devices_attend_with_their_rows_and_heads_and_hold_their_part_of_a_stack() -> None:
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", ON_A_MESH], cwd=root, env=with_devices(4), check=True)


@pytest.mark.parametrize("config", [micro.T5_1_1, micro.PER_LAYER])
def test_a_fused_encoder_is_the_same_encoder(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(t5_encoder, "FEWEST_KEYS", 1)
    config = dataclasses.replace(config, num_encoder_layers=1)
    prefixes = tuple(
        dataclasses.replace(prefix, before=True)
        for prefix in micro.make_prefixes(config, layers=config.num_encoder_layers)
    )
    tokens = micro.token_rows([5, 3])
    results, texts = [], []
    for fused in (False, True):
        model = micro.make_t5(config, dropout_rate=0.2)
        model.fused_attention = fused
        graphdef, params = param_tree.split(model)

        def loss(prompt: Any, params: Any, graphdef: Any = graphdef) -> Any:
            model = param_tree.merge(graphdef, params)
            context = model.read(
                model.embed(tokens, prompt),
                injections=Injections(prefixes={"encoder": prefixes}),
                key=jax.random.key(0),
            )
            mask = context.mask_BU[..., None]
            return jnp.sum(jnp.where(mask, jnp.sin(3 * context.hidden_BUD), 0.0))

        run = jax.jit(jax.value_and_grad(loss))
        prompt = jnp.asarray(normal(2, config.embed_dim))
        texts.append(str(jax.make_jaxpr(run)(prompt, params)))
        results.append(run(prompt, params))
    assert "pallas_call" in texts[1]
    assert "pallas_call" not in texts[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *results)


def test_where_it_cannot_run_it_says_so() -> None:
    fused = Experiment(model=Model(fused_attention=True))
    with pytest.raises(UserError, match=r"model\.fused_attention is for frozen weights"):
        validate(dataclasses.replace(fused, method=FullTuning()))
    with pytest.raises(UserError, match=r"needs TPUs, and this run uses cpu"):
        build_model(fused)
