"""A relative position bias in every layer, beside one in every stack."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.inference.api import generate
from tests.micro import (
    PER_LAYER,
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
PROMPT = normal(3, D, seed=2)
LAYERS = [f"{stack}/layers_{i}" for stack in ("encoder", "decoder") for i in (0, 1)]
BIASES = [f"{layer}/relpos_bias/rel_embedding" for layer in LAYERS]


def with_params(model, **changes):
    graphdef, params = param_tree.split(model)
    return param_tree.merge(graphdef, params | changes)


def test_layers_with_the_bias_of_their_stack_are_a_t5():
    # So few buckets that six positions tell the causal kind from the other.
    few = {"relpos_num_buckets": 8, "relpos_max_distance": 16}
    shared = make_t5(dataclasses.replace(T5_1_1, **few))
    _, params = param_tree.split(shared)
    tables = {name: params[f"{name.split('/')[0]}/relpos_bias/rel_embedding"] for name in BIASES}
    rest = {name: p for name, p in params.items() if "relpos_bias" not in name}
    model = with_params(make_t5(dataclasses.replace(PER_LAYER, **few)), **rest, **tables)
    assert param_tree.split(model)[1].keys() == rest.keys() | set(BIASES)
    got, want = call(model, SOURCE, TARGET, PROMPT), call(shared, SOURCE, TARGET, PROMPT)
    np.testing.assert_array_equal(got, want)


def test_each_bias_acts_on_its_own_layer():
    """By derivatives: the first layer's output does not know the biases of later ones."""
    graphdef, params = param_tree.split(make_t5(PER_LAYER))
    biases = {name: params[name] for name in BIASES}

    def logits(biases):
        return jnp.sum(
            param_tree.merge(graphdef, params | biases)(SOURCE, TARGET) * normal(2, 6, V)
        )

    gradients = jax.jit(jax.grad(logits))(biases)
    norms = {name: float(jnp.linalg.norm(g)) for name, g in gradients.items()}
    assert min(norms.values()) > 1e-2, norms
    # Causal in the decoder: 6 positions look back over 6 distances and never ahead, all exact.
    for name, gradient in gradients.items():
        used = np.asarray(jnp.any(gradient != 0, axis=0))
        forward = PER_LAYER.relpos_num_buckets // 2
        ahead = [forward + i for i in range(1, 5)] if name.startswith("encoder") else []
        assert set(np.flatnonzero(used)) == {*range(5 if ahead else 6), *ahead}, name


@functools.partial(jax.jit, static_argnums=0)
def one_token_at_a_time(graphdef, params, tokens_BS, prompt, injections):
    model = param_tree.merge(graphdef, params)
    read = model.encode(SOURCE, prompt, injections=injections)
    context, caches = model.start_decoding(read, tokens_BS.shape[1])

    def step(caches, at):
        position, tokens_B = at
        logits, caches = model.decode_step(
            tokens_B, position, caches, context, injections=model.injections_for_writing(injections)
        )
        return caches, logits

    positions = jnp.arange(tokens_BS.shape[1])
    return jax.lax.scan(step, caches, (positions, tokens_BS.T))[1].swapaxes(0, 1)


@pytest.mark.parametrize("prefixed", [False, True], ids=["", "prefixes"])
def test_decoding_with_a_cache_gives_the_logits_of_all_positions_at_once(prefixed):
    from prompt_tuning_jax.models.injections import NO_INJECTIONS, Injections

    injections = NO_INJECTIONS
    if prefixed:
        prefixes = [make_prefixes(PER_LAYER, layers=2, seed=seed) for seed in range(3)]
        names = ("encoder", "decoder", "cross")
        injections = Injections(prefixes=dict(zip(names, prefixes, strict=True)))
    model = make_t5(PER_LAYER)
    cached = one_token_at_a_time(*param_tree.split(model), TARGET, PROMPT, injections)
    want = call(model, SOURCE, TARGET, PROMPT, injections=injections)
    np.testing.assert_allclose(cached, want, atol=2e-5)


def test_greedy_and_beams_write_what_the_uncached_model_prefers():
    model, length = make_t5(PER_LAYER), 5
    ids = np.zeros((2, length), np.int32)
    for s in range(length):
        ids[:, s] = np.argmax(call(model, SOURCE, shifted(ids), PROMPT)[:, s], axis=-1)
    ended = np.cumsum(ids == 1, axis=1) - (ids == 1) > 0
    want = np.where(ended, 0, ids)
    np.testing.assert_array_equal(generate(model, SOURCE, PROMPT, max_length=length).ids, want)
    beams = generate(
        model, SOURCE, PROMPT, "beam", max_length=length, num_beams=3, length_penalty=0.0
    )
    # The score of a hypothesis is the uncached model's log-probability of it.
    for k in range(3):
        log_probs = jax.nn.log_softmax(call(model, SOURCE, shifted(beams.ids[:, k]), PROMPT))
        at = np.take_along_axis(np.asarray(log_probs), beams.ids[:, k][..., None], axis=-1)[..., 0]
        total = at.sum(axis=1, where=beams.ids[:, k] != 0)
        np.testing.assert_allclose(beams.scores[:, k], total, atol=1e-4)


def test_padding_on_either_side_changes_nothing():
    """Relative positions: real tokens keep their distances wherever the padding lies."""
    model = make_t5(PER_LAYER)
    want = call(model, SOURCE, TARGET)
    right = np.pad(SOURCE, ((0, 0), (0, 4)))
    left = np.stack([np.roll(row, 11 - np.count_nonzero(row)) for row in right])
    assert (left[:, -1] == 1).all() and left.shape == right.shape == (2, 11)
    for padded in (right, left):
        np.testing.assert_allclose(call(model, padded, TARGET), want, atol=1e-5)
        hidden = encode(model, padded).hidden_BUD[padded != 0]
        np.testing.assert_allclose(hidden, encode(model, SOURCE).hidden_BUD[SOURCE != 0], atol=1e-5)


def test_a_stack_of_another_depth():
    config = dataclasses.replace(PER_LAYER, num_encoder_layers=3, num_decoder_layers=1)
    names = {name for name in param_tree.split(make_t5(config))[1] if "relpos" in name}
    assert names == {
        *(f"encoder/layers_{i}/relpos_bias/rel_embedding" for i in range(3)),
        "decoder/layers_0/relpos_bias/rel_embedding",
    }
