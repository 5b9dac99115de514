"""Injections: what a method fills reaches the pass it is for, and step by step as all at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prompt_tuning_jax.models.injections import NO_INJECTIONS, Injections, ModelInput
from prompt_tuning_jax.models.layers import Linear
from prompt_tuning_jax.models.t5.model import T5
from tests.micro import (
    ONE_LAYER,
    T5_1_0,
    T5_1_1,
    D,
    V,
    call,
    encode,
    make_prefixes,
    make_t5,
    normal,
    shifted,
    token_rows,
)

SOURCE = token_rows([5, 3], 7)
TARGET = shifted(token_rows([4, 6], 6, seed=1))
PREFIXES = ("encoder", "decoder", "cross")


def filled(*names, batch=1):
    seeds = {name: seed for seed, name in enumerate(PREFIXES)}
    return Injections(
        prefixes={n: make_prefixes(T5_1_1, layers=2, batch=batch, seed=seeds[n]) for n in names}
    )


def step_by_step(model, prompt, injections, *, max_length):
    read = model.encode(SOURCE, prompt, injections=injections)
    context, caches = model.start_decoding(read, max_length)

    def step(caches, tokens_and_position):
        tokens_B, position = tokens_and_position
        logits_BV, caches = model.decode_step(
            tokens_B, position, caches, context, injections=model.injections_for_writing(injections)
        )
        return caches, logits_BV

    steps = (jnp.asarray(TARGET.T), jnp.arange(TARGET.shape[1]))
    return jnp.swapaxes(jax.lax.scan(step, caches, steps)[1], 0, 1)


@pytest.mark.parametrize(
    ("config", "prompt", "injections"),
    [
        (T5_1_1, None, NO_INJECTIONS),
        (T5_1_0, normal(3, D), NO_INJECTIONS),
        (T5_1_1, normal(2, 3, D), filled("decoder")),
        (T5_1_1, None, filled("cross", batch=2)),
        (T5_1_0, normal(3, D), filled(*PREFIXES, batch=2)),
    ],
    ids=["bare", "1.0 prompt", "decoder prefixes", "cross prefixes", "1.0 all"],
)
def test_cached_decoding_gives_the_logits_of_teacher_forcing(config, prompt, injections):
    model = make_t5(config)
    prompt = None if prompt is None else jnp.asarray(prompt)
    # A cache longer than what is written: its empty end must stay hidden.
    run = jax.jit(lambda injections: step_by_step(model, prompt, injections, max_length=9))
    want = call(model, SOURCE, TARGET, prompt, injections=injections)
    np.testing.assert_allclose(run(injections), want, atol=2e-5)


def test_cached_decoding_in_bfloat16():
    model = make_t5(dtype=jnp.bfloat16)
    got = jax.jit(lambda: step_by_step(model, None, NO_INJECTIONS, max_length=6))()
    want = call(model, SOURCE, TARGET)
    assert got.dtype == jnp.float32
    assert np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)


def test_every_prefix_reaches_every_example_from_every_layer_and_position():
    model = make_t5()
    weight = normal(*TARGET.shape, V, seed=8)

    def loss(injections):
        logits = model(SOURCE, TARGET, injections=injections)
        return jnp.stack([jnp.sum(logits[row] * weight[row]) for row in range(2)])

    jacobian = jax.jit(jax.jacrev(loss))(filled(*PREFIXES, batch=2))
    leaves = jax.tree.leaves(jacobian)
    assert len(leaves) == 3 * 2 * 2
    for leaf in leaves:  # [loss of row, row of prefix, P, H, K]
        seen = np.abs(leaf).sum(axis=-1)
        for row in range(2):
            assert (seen[row, row] > 0).all()
            assert not seen[row, 1 - row].any()


def test_one_prefix_for_all_is_the_same_one_for_each():
    model = make_t5()
    one = filled(*PREFIXES)
    each = jax.tree.map(lambda x: jnp.concatenate([x, x]), one)
    np.testing.assert_allclose(
        call(model, SOURCE, TARGET, injections=one),
        call(model, SOURCE, TARGET, injections=each),
        atol=1e-5,
    )


def test_prefixes_of_the_decoder_leave_the_encoder_alone():
    model = make_t5()
    bare = encode(model, SOURCE)
    both = filled("decoder", "cross")
    np.testing.assert_array_equal(
        encode(model, SOURCE, injections=both).hidden_BUD, bare.hidden_BUD
    )
    prefixed = encode(model, SOURCE, injections=filled("encoder"))
    np.testing.assert_array_equal(prefixed.mask_BU, bare.mask_BU)
    assert prefixed.hidden_BUD.shape == bare.hidden_BUD.shape
    assert np.abs(prefixed.hidden_BUD - bare.hidden_BUD).max() > 0.1


def test_the_decoder_stays_causal_behind_a_prefix():
    model = make_t5()
    injections = filled(*PREFIXES)
    logits = call(model, SOURCE, TARGET, injections=injections)
    for position in range(1, 6):
        changed = TARGET.copy()
        changed[:, position:] = 7
        other = call(model, SOURCE, changed, injections=injections)
        np.testing.assert_array_equal(other[:, :position], logits[:, :position])
        assert (np.abs(other[:, position] - logits[:, position]).max(axis=-1) > 1e-3).any()


def test_an_encoder_input_takes_the_place_of_tokens_and_prompt():
    model = make_t5()
    prompt = normal(3, D)
    given = Injections(model_input=model.embed(SOURCE, jnp.asarray(prompt)))
    want = call(model, SOURCE, TARGET, prompt)
    np.testing.assert_allclose(call(model, SOURCE * 0, TARGET, injections=given), want, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_an_attention_mask_takes_sight_away_and_gives_none_back(batch):
    model = make_t5(ONE_LAYER)
    source = model.embed(SOURCE)
    random = np.random.default_rng(0)
    allowed_BUU = random.random((batch, 7, 7)) < 0.5

    def hidden(x_BUD):
        given = ModelInput(
            embeddings_BUD=x_BUD, mask_BU=source.mask_BU, attention_mask_BUU=allowed_BUU
        )
        return jnp.sum(
            model.encode(SOURCE, injections=Injections(model_input=given)).hidden_BUD ** 3, -1
        )

    jacobian = np.abs(jax.jit(jax.jacrev(hidden))(source.embeddings_BUD)).sum(axis=-1)
    for row in range(2):
        allowed_UU = allowed_BUU[row % batch] & (SOURCE[row] != 0)[None, :]
        some = allowed_UU.any(axis=1)  # what sees nothing at all has no meaning
        want = allowed_UU | np.eye(7, dtype=bool)
        np.testing.assert_array_equal((jacobian[row, :, row] > 0)[some], want[some])


class Doubled(nnx.Module):
    def __init__(self, head: Linear):
        self.head = head

    def __call__(self, x):
        return 2 * self.head(x)


def test_a_new_output_head_is_used_all_at_once_and_step_by_step():
    want = call(make_t5(), SOURCE, TARGET)
    model: T5 = make_t5()
    model.decoder.logits_dense = Doubled(model.decoder.logits_dense)
    np.testing.assert_allclose(call(model, SOURCE, TARGET), 2 * want, atol=1e-4)
    by_step = jax.jit(lambda: step_by_step(model, None, NO_INJECTIONS, max_length=6))()
    np.testing.assert_allclose(by_step, 2 * want, atol=1e-4)


def test_slots_are_empty_unless_filled_and_pass_through_jax():
    assert all(not getattr(NO_INJECTIONS, field.name) for field in dataclasses.fields(Injections))
    injections = filled(*PREFIXES)
    doubled = jax.jit(lambda s: jax.tree.map(lambda x: 2 * x, s))(injections)
    assert isinstance(doubled, Injections) and len(doubled.prefixes["cross"]) == 2
    np.testing.assert_array_equal(
        doubled.prefixes["cross"][1].value_BPGK, 2 * injections.prefixes["cross"][1].value_BPGK
    )
