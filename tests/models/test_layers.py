"""Layers without a view of the sequence, against numpy in float64."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.models.layers import Embed, Linear, RMSNorm, dropout, normal_param, split_key
from prompt_tuning_jax.models.t5.model import T5
from tests.micro import T5_1_0, T5_1_1, D, make_t5, normal

EPS = T5_1_1.layer_norm_eps
FLOAT32 = {"dtype": jnp.float32, "param_dtype": jnp.float32}


def values(module):
    return {name: np.asarray(p, np.float64) for name, p in param_tree.split(module)[1].items()}


def test_rms_norm_divides_by_the_root_mean_square_without_centring():
    norm = make_t5().encoder.encoder_norm
    x = normal(3, 5, D, scale=4) + 2
    x[0, 0] = 0  # eps keeps it finite
    want = x / np.sqrt((x.astype(np.float64) ** 2).mean(axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(norm(jnp.asarray(x)), want * values(norm)["scale"], rtol=1e-5)
    tiny = jnp.full((1, D), 1e-3)  # here eps, 1e-6, is as large as the mean square
    np.testing.assert_allclose(
        norm(tiny)[0], 1e-3 / math.sqrt(2e-6) * values(norm)["scale"], rtol=1e-5
    )


def test_rms_norm_rounds_once_at_the_end():
    wide = RMSNorm(D, eps=EPS, **FLOAT32)
    low = RMSNorm(D, eps=EPS, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    x = jnp.asarray(normal(64, D), jnp.bfloat16)
    want = wide(x.astype(jnp.float32)).astype(jnp.bfloat16)
    assert low(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(low(x), want)


def test_linear_multiplies_and_its_dtypes_are_as_told():
    kwargs = {"axes": ("embed", "mlp"), "std": 1.0, "rngs": nnx.Rngs(0)}
    x = normal(2, 3, 5)
    linear = Linear(5, 7, **kwargs, **FLOAT32)
    np.testing.assert_allclose(linear(x), x @ values(linear)["kernel"], atol=1e-5)
    low = {"dtype": jnp.bfloat16, "param_dtype": jnp.float32}
    assert Linear(5, 7, **kwargs, **low)(x).dtype == jnp.bfloat16
    assert Linear(5, 7, **kwargs, **low, out_dtype=jnp.float32)(x).dtype == jnp.float32


def test_embed_takes_rows_and_attends_to_them():
    embed = make_t5(T5_1_0).token_embedder
    table_VD = values(embed)["embedding"]
    tokens = np.array([[3, 3, 0], [63, 1, 5]])
    np.testing.assert_array_equal(embed(tokens), table_VD[tokens].astype(np.float32))
    x = normal(2, 3, D)
    np.testing.assert_allclose(embed.attend(jnp.asarray(x)), x @ table_VD.T, atol=1e-4)
    low = Embed(T5_1_1, dtype=jnp.bfloat16, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    assert low(tokens).dtype == jnp.bfloat16
    assert low.attend(jnp.asarray(x)).dtype == jnp.float32


def gelu(x):  # the tanh form
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("config", [T5_1_1, T5_1_0], ids=["1.1", "1.0"])
def test_mlp_by_hand(config):
    mlp = make_t5(config).encoder.layers_0.mlp
    params, x = values(mlp), normal(2, 3, D)
    if config is T5_1_0:
        assert params.keys() == {"wi/kernel", "wo/kernel"}
        hidden = np.maximum(x @ params["wi/kernel"], 0)
    else:
        hidden = gelu(x @ params["wi_0/kernel"]) * (x @ params["wi_1/kernel"])
    np.testing.assert_allclose(mlp(jnp.asarray(x)), hidden @ params["wo/kernel"], atol=2e-5)


def test_dropout_keeps_the_mean_and_zeroes_the_share():
    x = jnp.asarray(normal(200, 300) + 3)
    dropped = np.asarray(dropout(x, 0.2, key=jax.random.key(0)))
    zero = dropped == 0
    assert 0.19 < zero.mean() < 0.21
    np.testing.assert_allclose(dropped[~zero], np.asarray(x)[~zero] / 0.8, rtol=1e-6)
    assert dropped.mean() == pytest.approx(3, abs=0.03)


def test_dropout_shares_its_decision_along_the_axis_it_is_told():
    zero = (
        np.asarray(dropout(jnp.ones((4, 10, 50)), 0.5, key=jax.random.key(1), shared_axis=-2)) == 0
    )
    assert (zero == zero[:, :1]).all()
    assert not (zero == zero[:1]).all()


def test_dropout_is_the_identity_without_key_or_rate():
    x = jnp.ones((3, 4), jnp.bfloat16)
    assert dropout(x, 0.5, key=None) is x
    assert dropout(x, 0.0, key=jax.random.key(0)) is x
    assert dropout(x, 0.5, key=jax.random.key(0)).dtype == jnp.bfloat16


def test_split_key_gives_different_keys_or_none():
    assert split_key(None, 3) == [None] * 3
    keys = [tuple(jax.random.key_data(k).tolist()) for k in split_key(jax.random.key(0), 5)]
    assert len(set(keys)) == 5


def test_a_normal_parameter_has_its_spread_dtype_and_axes():
    param = normal_param(nnx.Rngs(0), (300, 200), ("embed", "mlp"), std=0.05, dtype=jnp.bfloat16)
    value = param.get_value()
    assert value.dtype == jnp.bfloat16 and value.shape == (300, 200)
    assert param.get_metadata()["logical_axes"] == ("embed", "mlp")
    assert np.asarray(value, np.float32).std() == pytest.approx(0.05, rel=0.02)


def test_random_weights_start_as_t5_does():
    config = dataclasses.replace(T5_1_1, embed_dim=48, num_heads=3, head_dim=32, mlp_dim=96)
    params = values(T5(config, rngs=nnx.Rngs(0)))
    spread = {
        "token_embedder/embedding": 1,
        "relpos_bias/rel_embedding": 48**-0.5,
        "query/kernel": (48 * 32) ** -0.5,  # 1/sqrt(K) is in here and not in attention
        "key/kernel": 48**-0.5,
        "value/kernel": 48**-0.5,
        "out/kernel": (3 * 32) ** -0.5,
        "wi_0/kernel": 48**-0.5,
        "wi_1/kernel": 48**-0.5,
        "wo/kernel": 96**-0.5,
        "logits_dense/kernel": 48**-0.5,
    }
    for name, value in params.items():
        if name.endswith("/scale"):
            assert (value == 1).all()
            continue
        (want,) = (std for end, std in spread.items() if name.endswith(end))
        assert value.std() == pytest.approx(want, rel=0.25 if value.size < 1000 else 0.06), name
    drawn = [value.tobytes() for name, value in params.items() if not name.endswith("/scale")]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradients_of_the_norm_are_those_of_its_formula(dtype):
    norm = RMSNorm(D, eps=EPS, dtype=jnp.dtype(dtype), param_dtype=jnp.float32)
    graphdef, _ = param_tree.split(norm)
    x = jax.random.normal(jax.random.key(0), (4, 3, T5_1_1.embed_dim), dtype)
    scale = 1 + jax.random.normal(jax.random.key(1), (T5_1_1.embed_dim,)) / 4
    weight = jax.random.normal(jax.random.key(2), x.shape)

    def ours(x, scale):
        return jnp.sum(param_tree.merge(graphdef, {"scale": scale})(x).astype(jnp.float32) * weight)

    def formula(x, scale):
        x32 = x.astype(jnp.float32)
        rms = jnp.sqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + T5_1_1.layer_norm_eps)
        return jnp.sum((x32 / rms * scale).astype(dtype).astype(jnp.float32) * weight)

    for own, expected in zip(
        jax.grad(ours, argnums=(0, 1))(x, scale),
        jax.grad(formula, argnums=(0, 1))(x, scale),
        strict=True,
    ):
        assert own.dtype == expected.dtype
        tolerance = 1e-5 if dtype == "float32" else 3e-2
        np.testing.assert_allclose(
            np.float32(own), np.float32(expected), atol=tolerance, rtol=tolerance
        )
