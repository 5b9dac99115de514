"""Attention and relative positions against a few lines of numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.models.injections import KeyValues
from prompt_tuning_jax.models.ops.attention import MASK_VALUE, dropout_weights
from prompt_tuning_jax.models.t5.attention import bias_of, relative_position_bucket
from tests.micro import T5_1_1, D, make_prefixes, make_t5, normal

HEADS, WIDTH = T5_1_1.num_heads, T5_1_1.head_dim


@pytest.mark.parametrize("direction", ["bidir", "causal"])
@pytest.mark.parametrize(
    "size", ["nb32_md128", "nb32_md256", "nb16_md64", "nb24_md96", "nb64_md128"]
)
def test_buckets_are_those_of_transformers(shared, size, direction):
    want = np.load(shared / "fixtures/hf/relpos_buckets.npz")
    buckets, distance = size.split("_")
    got = relative_position_bucket(
        jnp.asarray(want["relative_position"]),
        bidirectional=direction == "bidir",
        num_buckets=int(buckets.removeprefix("nb")),
        max_distance=int(distance.removeprefix("md")),
    )
    np.testing.assert_array_equal(got, want[f"{size}_{direction}"])


def bucket(distance, *, bidirectional):
    return np.asarray(
        relative_position_bucket(
            jnp.asarray(distance), bidirectional=bidirectional, num_buckets=32, max_distance=128
        )
    )


def test_buckets_are_exact_when_near_and_never_shrink_with_distance():
    behind = bucket(-np.arange(300), bidirectional=False)
    np.testing.assert_array_equal(behind[:16], np.arange(16))
    assert (np.diff(behind) >= 0).all() and behind[-1] == 31
    assert not bucket(np.arange(300), bidirectional=False).any()  # ahead: never seen
    before, after = (bucket(s * np.arange(1, 300), bidirectional=True) for s in (-1, 1))
    np.testing.assert_array_equal(after, before + 16)
    assert before.max() == 15


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_the_bias_is_the_tables_entry_at_key_minus_query(stack):
    model = make_t5()
    module = getattr(model, stack).relpos_bias
    queries, keys = np.arange(4) + 30, np.arange(40)
    bias_1HQK = module(jnp.asarray(queries), jnp.asarray(keys))
    table_HN = param_tree.split(model)[1][f"{stack}/relpos_bias/rel_embedding"]
    buckets = bucket(keys[None] - queries[:, None], bidirectional=stack == "encoder")
    assert bias_1HQK.dtype == jnp.float32
    np.testing.assert_array_equal(bias_1HQK[0], np.asarray(table_HN)[:, buckets])


def by_hand(attention, x_BTD, y_BUD, bias, prefix):
    params = {n: np.asarray(p, np.float64) for n, p in param_tree.split(attention)[1].items()}

    def heads(name, z):
        return (z @ params[f"{name}/kernel"]).reshape(*z.shape[:2], HEADS, WIDTH)

    query, key, value = heads("query", x_BTD), heads("key", y_BUD), heads("value", y_BUD)
    out = np.zeros((*x_BTD.shape[:2], HEADS, WIDTH))
    for b, t, h in np.ndindex(*x_BTD.shape[:2], HEADS):
        keys, values, scores = key[b, :, h], value[b, :, h], bias[b, h, t]
        if prefix is not None:
            row = b % len(prefix.key_BPGK)
            keys = np.concatenate([np.asarray(prefix.key_BPGK)[row, :, h], keys])
            values = np.concatenate([np.asarray(prefix.value_BPGK)[row, :, h], values])
            scores = np.concatenate([np.zeros(len(keys) - len(scores)), scores])
        scores = scores + keys @ query[b, t, h]  # no 1/sqrt(K)
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights / weights.sum() @ values
    return out.reshape(*x_BTD.shape[:2], -1) @ params["out/kernel"]


@pytest.mark.parametrize("prefix_batch", [0, 1, 3])
def test_attention_by_hand(prefix_batch):
    attention = make_t5().decoder.layers_0.encoder_decoder_attention
    x_BTD, y_BUD = normal(3, 4, D, seed=1), normal(3, 5, D, seed=2)
    bias = normal(3, HEADS, 4, 5, seed=3) + np.where(
        normal(3, 1, 4, 5, seed=4) > 0.8, MASK_VALUE, 0
    )
    prefix = None
    if prefix_batch:
        (prefix,) = make_prefixes(T5_1_1, layers=1, batch=prefix_batch)
    got = jax.jit(
        lambda x, y: attention(
            x, attention.keys_values(y), jnp.asarray(bias, jnp.float32), prefix=prefix
        )
    )(x_BTD, y_BUD)
    np.testing.assert_allclose(got, by_hand(attention, x_BTD, y_BUD, bias, prefix), atol=2e-5)


def test_a_query_that_may_see_nothing_gives_numbers_and_one_behind_a_prefix_sees_that():
    attention = make_t5().encoder.layers_0.attention
    x_BTD = jnp.asarray(normal(1, 4, D))
    hidden = bias_of(jnp.zeros((1, 4, 4), bool))
    keys = attention.keys_values(x_BTD)
    assert np.isfinite(attention(x_BTD, keys, hidden)).all()
    (prefix,) = make_prefixes(T5_1_1, layers=1)
    nothing = KeyValues(key_BPGK=keys.key_BPGK[:, :0], value_BPGK=keys.value_BPGK[:, :0])
    np.testing.assert_allclose(
        attention(x_BTD, keys, hidden, prefix=prefix),
        attention(x_BTD, nothing, hidden[..., :0], prefix=prefix),
        atol=1e-6,
    )


def test_bias_of_a_mask():
    mask_BQK = np.array([[[True, False], [False, True]]])
    bias = bias_of(jnp.asarray(mask_BQK))
    assert bias.shape == (1, 1, 2, 2) and bias.dtype == jnp.float32
    np.testing.assert_array_equal(bias[0, 0] == 0, mask_BQK[0])
    assert (np.asarray(bias)[0, 0][~mask_BQK[0]] == np.float32(MASK_VALUE)).all()


def test_dropout_of_weights_is_one_mask_for_all_examples_and_heads():
    ones = jnp.ones((3, 2, 40, 50))
    dropped = np.asarray(dropout_weights(ones, 0.25, key=jax.random.key(0)))
    np.testing.assert_array_equal(dropped, np.broadcast_to(dropped[:1, :1], dropped.shape))
    np.testing.assert_allclose(np.unique(dropped), [0, 1 / 0.75], rtol=1e-6)
    assert 0.2 < (dropped[0, 0] == 0).mean() < 0.3
    assert dropout_weights(ones, 0.25, key=None) is ones
    assert dropout_weights(ones, 0.0, key=jax.random.key(0)) is ones
