"""Optimizers against a few lines of numpy, schedules by formula, and what the mask keeps still."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.config.experiment import Optimizer
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.training.optim import make_optimizer, make_schedule
from tests.micro import normal

SHAPE = (4, 6)
OPTIMIZERS = {
    "adafactor": Optimizer(),
    "adafactor factored": Optimizer(min_dim_size_to_factor=2, multiply_by_parameter_scale=True),
    "adamw": Optimizer(name="adamw", weight_decay=0.1),
    "sgd": Optimizer(name="sgd", weight_decay=0.1),
    "momentum": Optimizer(name="sgd", momentum=0.9, gradient_clip_norm=0.5),
}


def gradients(steps, scale=1.0):
    return [
        normal(*SHAPE, seed=10 + step, scale=scale * 10.0 ** (-step % 3)) for step in range(steps)
    ]


def run(config, start, all_gradients, rates):
    optimizer = make_optimizer(config, {"p": True})
    params = {"p": jnp.asarray(start)}
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, gradient, rate):
        updates, state = optimizer.update({"p": gradient}, state, params, learning_rate=rate)
        return jax.tree.map(jnp.add, params, updates), state

    history = []
    for gradient, rate in zip(all_gradients, rates, strict=True):
        params, state = step(params, state, gradient, rate)
        history.append(np.asarray(params["p"]))
    return history


def agrees(config, rule, *, rates=(0.3, 0.1, 0.2, 0.3, 0.05)):
    """``rule(p, gradient, rate, t, memory)`` is the optimizer in numpy; t counts from 1."""
    p, memory, want = normal(*SHAPE, seed=1).astype(np.float64), {}, []
    everything = gradients(len(rates))
    for t, (gradient, rate) in enumerate(zip(everything, rates, strict=True), 1):
        p = rule(p, gradient.astype(np.float64), rate, t, memory)
        want.append(p)
    got = run(config, normal(*SHAPE, seed=1), everything, rates)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)


def test_sgd_by_hand():
    agrees(
        Optimizer(name="sgd", weight_decay=0.1),
        lambda p, g, rate, t, memory: p - rate * (g + 0.1 * p),
    )


def test_momentum_and_clipping_by_hand():
    def rule(p, g, rate, t, memory):
        g = g * min(1.0, 0.5 / np.linalg.norm(g))
        memory["m"] = 0.9 * memory.get("m", 0) + g
        return p - rate * memory["m"]

    config = Optimizer(name="sgd", momentum=0.9, weight_decay=0.0, gradient_clip_norm=0.5)
    agrees(config, rule)


def test_adamw_by_hand():
    def rule(p, g, rate, t, memory):
        memory["m"] = 0.8 * memory.get("m", 0) + 0.2 * g
        memory["v"] = 0.95 * memory.get("v", 0) + 0.05 * g**2
        m, v = memory["m"] / (1 - 0.8**t), memory["v"] / (1 - 0.95**t)
        return p - rate * (m / (np.sqrt(v) + 1e-8) + 0.1 * p)

    agrees(Optimizer(name="adamw", beta1=0.8, beta2=0.95, weight_decay=0.1), rule)


def adafactor(p, g, rate, t, memory, *, initial_step=0, scaled=False, clip=1.0, decay=0.01):
    beta = 1 - (t + initial_step) ** -0.8
    memory["v"] = beta * memory.get("v", 0) + (1 - beta) * (g**2 + 1e-30)
    u = g / np.sqrt(memory["v"])
    u = u / max(1.0, np.sqrt((u**2).mean()) / clip) if clip else u
    scale = max(np.sqrt((p**2).mean()), 1e-3) if scaled else 1.0
    return p - rate * scale * u - decay * p  # the decay is not scaled by the rate


@pytest.mark.parametrize("initial_step", [0, 1_100_000])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("clip", [1.0, 0.0, 0.4])
def test_adafactor_by_hand(initial_step, scaled, clip):
    config = Optimizer(
        weight_decay=0.01,
        initial_step=initial_step,
        multiply_by_parameter_scale=scaled,
        clipping_threshold=clip,
    )
    if initial_step and not clip:
        pytest.skip("updates of a thousandfold: nothing to compare")
    agrees(
        config,
        lambda *args: adafactor(*args, initial_step=initial_step, scaled=scaled, clip=clip),
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_mask_keeps_what_is_frozen_whatever_is_handed_in(name):
    config = OPTIMIZERS[name]
    mask = {"prompt": True, "model/a": False, "model/b": False}
    optimizer = make_optimizer(config, mask)
    params = {key: jnp.asarray(normal(*SHAPE, seed=i)) for i, key in enumerate(mask)}
    alone = {"prompt": params["prompt"]}
    state, state_alone = optimizer.init(params), optimizer.init(alone)
    arrays = [leaf.shape for leaf in jax.tree.leaves(state)]
    assert arrays == [leaf.shape for leaf in jax.tree.leaves(state_alone)]
    before = {key: np.asarray(p).copy() for key, p in params.items()}

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params, learning_rate=0.3)
        return jax.tree.map(jnp.add, params, updates), state

    for gradient in gradients(4):
        # Huge, and not even numbers: neither may leak into the prompt's clipping or moments.
        whole = {"prompt": gradient, "model/a": 1e6 * gradient, "model/b": gradient * np.nan}
        params, state = step(params, state, whole)
        alone, state_alone = step(alone, state_alone, {"prompt": gradient})
    for key in ("model/a", "model/b"):
        np.testing.assert_array_equal(
            np.asarray(params[key]).view(np.uint32), before[key].view(np.uint32)
        )
    assert (np.asarray(params["prompt"]) != before["prompt"]).all()
    np.testing.assert_allclose(params["prompt"], alone["prompt"], atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_zero_learning_rate_moves_nothing_but_adafactors_decay(name):
    config = dataclasses.replace(OPTIMIZERS[name])
    (after,) = run(config, normal(*SHAPE), gradients(1), [0.0])
    kept = 1 - config.weight_decay if config.name == "adafactor" else 1.0
    np.testing.assert_allclose(after, kept * normal(*SHAPE), rtol=1e-6)


def factors(total_steps=100, **kwargs):
    schedule = make_schedule(Optimizer(learning_rate=0.3, **kwargs), total_steps=total_steps)
    return np.array([float(schedule(jnp.asarray(step))) for step in range(0, 130, 5)])


STEPS = np.arange(0, 130, 5)


def test_constant_schedule():
    np.testing.assert_array_equal(factors(), 1)
    rise = np.minimum(1, (STEPS + 1) / 20)
    np.testing.assert_allclose(factors(warmup_steps=20), rise, rtol=1e-6)


@pytest.mark.parametrize(("warmup", "decay_steps"), [(0, 0), (20, 0), (20, 60)])
@pytest.mark.parametrize("end", [0.0, 0.03])
def test_linear_and_cosine_fall_to_their_end(warmup, decay_steps, end):
    last, ratio = decay_steps or 100, end / 0.3
    rise = np.minimum(1, (STEPS + 1) / warmup) if warmup else 1
    share = np.clip((STEPS - warmup) / (last - warmup), 0, 1)
    kwargs = {"warmup_steps": warmup, "decay_steps": decay_steps, "end_learning_rate": end}
    linear, cosine = (factors(schedule=name, **kwargs) for name in ("linear", "cosine"))
    np.testing.assert_allclose(linear, rise * (1 + (ratio - 1) * share), rtol=1e-5, atol=1e-7)
    half = [0.5 * (1 + math.cos(math.pi * s)) for s in share]
    np.testing.assert_allclose(
        cosine, rise * (ratio + (1 - ratio) * np.array(half)), rtol=1e-5, atol=1e-7
    )
    for got in (linear, cosine):
        np.testing.assert_allclose(got[last // 5 :], ratio, atol=1e-6)  # and stays there


@pytest.mark.parametrize("warmup", [0, 1, 20])
def test_rsqrt_falls_from_its_height_at_the_end_of_the_warm_up(warmup):
    height = max(warmup, 1)
    got = factors(schedule="rsqrt", warmup_steps=warmup)
    rise = np.minimum(1, (STEPS + 1) / height)
    np.testing.assert_allclose(
        got, rise * np.sqrt(height / np.maximum(STEPS + 1, height)), rtol=1e-5
    )
    assert got.max() <= 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rates_are_factors_on_the_learning_rate_of_what_matches_first(name):
    """Against runs in which everything has that rate; the norm of all is clipped in one alone."""
    config = dataclasses.replace(OPTIMIZERS[name], gradient_clip_norm=0.0)
    paths = ["method/a", "method/b", "model/x/adapter/lora_b_RF"]
    by_path = dict(zip(paths, (0.5, 4.0, 1.0), strict=True))

    def steps(config, rate):
        optimizer = make_optimizer(config, dict.fromkeys(paths, True) | {"model/x": False})
        params = {path: jnp.asarray(normal(*SHAPE, seed=i)) for i, path in enumerate(paths)}
        state = optimizer.init(params)
        for gradient in gradients(3):
            grads = dict.fromkeys(paths, jnp.asarray(gradient))
            updates, state = optimizer.update(grads, state, params, learning_rate=rate)
            params = jax.tree.map(jnp.add, params, updates)
        return params

    rates = ("method/a=0.5", "method/.*=4")
    got = steps(dataclasses.replace(config, rates=rates), 0.1)
    for path, factor in by_path.items():
        np.testing.assert_allclose(got[path], steps(config, 0.1 * factor)[path], rtol=1e-6)


@pytest.mark.parametrize("rate", ["method/c=2", "method/=2", "model/x=2", ".*/b=1", "b=2"])
def test_a_rate_that_nothing_follows_is_refused(rate):
    """Nothing of that path, nothing that trains, nothing left, nothing whose whole path it is."""
    mask = {"method/a": True, "method/b": True, "model/x": False}
    config = Optimizer(rates=("method/b=2", rate))
    with pytest.raises(UserError, match=r"optimizer\.rates") as caught:
        make_optimizer(config, mask)
    assert repr(rate) in str(caught.value) and "\n" not in str(caught.value)
    assert "method/a" in str(caught.value)
