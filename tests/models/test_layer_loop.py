"""Layers that run as one loop compute what they compute one by one, in a smaller program."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.config.experiment import Experiment, Optimizer, Training
from prompt_tuning_jax.distributed.sharding import stack
from prompt_tuning_jax.inference.ensemble import DecodeConfig, label_scores, write
from prompt_tuning_jax.inference.setup import attach_members, partitioner_of
from prompt_tuning_jax.methods import (
    Context,
    DeepPrompts,
    LoRA,
    MethodConfig,
    PrefixTuning,
    PromptTuning,
)
from prompt_tuning_jax.models import layers
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.models.layer_loop import repetitions
from prompt_tuning_jax.training import build
from prompt_tuning_jax.training.step import step_cost
from tests import micro, tiny_t5gemma, tiny_vit
from tests.micro import ONE_LAYER
from tests.tiny_lm import make_lm

LAYERS = 3
_ADAM = Optimizer(name="adamw", learning_rate=0.1, weight_decay=0.0)


def t5(*, dropout_rate: float = 0.0, layers: int = 2, **changes: Any) -> Model:
    config = dataclasses.replace(
        micro.T5_1_1, num_encoder_layers=layers, num_decoder_layers=layers, **changes
    )
    return micro.make_t5(config, dropout_rate=dropout_rate)


def gemma() -> Model:
    return make_lm("gemma", num_layers=4, windows=(4, 0, 4, 0))


def llama() -> Model:
    return make_lm("llama", num_layers=LAYERS, dropout_rate=0.1)


def t5gemma() -> Model:
    config = tiny_t5gemma.with_layers(tiny_t5gemma.CONFIGS["t5gemma2"], encoder=(3, 3, 0))
    decoder = dataclasses.replace(config.decoder, num_layers=2, windows=(3, 3))
    return tiny_t5gemma.make_t5gemma(dataclasses.replace(config, decoder=decoder))


def vit() -> Model:
    return tiny_vit.make_vit(dataclasses.replace(tiny_vit.MICRO, num_layers=LAYERS))


def batch_for(model: Model) -> dict[str, np.ndarray]:
    if model.config.reads_images:
        return {"inputs": tiny_vit.pixels(4)[None], "targets": np.array([[[0], [1], [1], [0]]])}
    batch = micro.make_batch()
    fill = model.token_ids.fill
    return {name: np.where(x == 0, fill, np.minimum(x, 30)) for name, x in batch.items()}


CASES: dict[str, tuple[Callable[[], Model], MethodConfig, dict[str, Any]]] = {
    "t5": (
        lambda: t5(dropout_rate=0.1),
        PromptTuning(length=3, init="uniform"),
        {"remat": "full"},
    ),
    "a position bias in each layer": (
        lambda: t5(relpos_per_layer=True),
        PromptTuning(length=3, init="uniform"),
        {"remat": "dots"},
    ),
    "adapters": (t5, LoRA(rank=2, dropout=0.5, targets=(".*/(query|value)",)), {}),
    "windows": (gemma, PromptTuning(length=3, init="uniform"), {}),
    "prefixes": (llama, PrefixTuning(length=2), {}),
    "t5gemma": (t5gemma, PromptTuning(length=3, init="uniform"), {}),
    "images": (vit, DeepPrompts(length=2, init="uniform"), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_that_loops_over_layers_is_the_same_step(name: str) -> None:
    make, method, options = CASES[name]
    products, costs, trained = [], [], []
    for scan in (False, True):
        model = make()
        model.scan_layers = scan
        batch = batch_for(model)
        trainer = micro.Trainer(
            method,
            _ADAM,
            model=model,
            context=Context(labels=("0", "1")),
            **options,
        )
        before = {**trainer.frozen}
        if scan:
            trainer.frozen = param_tree.stack_layers(dict(before), stack)
            assert len(trainer.frozen) < 0.7 * len(before)
        arguments = trainer.state, trainer.frozen, batch
        lowered = trainer.step.lower(*arguments)
        products.append(lowered.as_text().count("stablehlo.dot_general"))
        costs.append(step_cost(trainer.step, *arguments))
        state, _ = lowered.compile()(*arguments)
        trained.append(state.trainable)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), *trained)
    assert products[1] < 0.8 * products[0]
    # A loop derives what the first layer alone need not.
    assert costs[0].flops <= costs[1].flops < 1.15 * costs[0].flops


@pytest.mark.parametrize("make", [t5, gemma, t5gemma])
def test_evaluations_that_loop_over_layers_are_the_same(make: Callable[[], Model]) -> None:
    experiment = Experiment(
        method=PromptTuning(length=3, init="uniform"), training=Training(scan_layers="on")
    )
    plain = attach_members(experiment, make(), labels=())
    looped = build.with_stacked_layers(
        experiment,
        dataclasses.replace(plain, frozen=dict(plain.frozen)),
        partitioner_of(experiment),
    )
    assert len(looped.frozen) < 0.7 * len(plain.frozen)
    tokens_BT = micro.token_rows([7, 5, 2], 7)
    labels_CS = np.array([[5, 6, 7], [8, 9, 0]])
    decode = DecodeConfig(max_length=4)
    products, scores, written = [], [], []
    for members in (plain, looped):
        arguments = members.graphdef, members.trainable, members.frozen, tokens_BT
        lowered = label_scores.lower(*arguments, labels_CS, 1)
        products.append(lowered.as_text().count("stablehlo.dot_general"))
        scores.append(label_scores(*arguments, labels_CS, 1))
        graphdef, *arrays = arguments
        written.append(write(graphdef, decode, *arrays, jax.random.key(0)))
    assert products[1] < 0.8 * products[0]
    np.testing.assert_allclose(*scores, rtol=2e-4, atol=2e-5)
    np.testing.assert_array_equal(*(ids for ids, _ in written))
    np.testing.assert_allclose(*(found for _, found in written), rtol=2e-4, atol=2e-5)


def test_repetitions_cover_a_sequence() -> None:
    assert list(repetitions("aaaaa")) == [(0, 1, 5)]
    assert list(repetitions("ababa")) == [(0, 2, 2), (4, 1, 1)]
    assert list(repetitions("xaaa")) == [(0, 1, 1), (1, 1, 3)]
    assert list(repetitions("llllllgllllllg")) == [(0, 7, 2)]
    random = np.random.default_rng(0)
    for _ in range(50):
        text = "".join(random.choice(list("abc"), 20))
        spelled = "".join(text[start : start + p] * times for start, p, times in repetitions(text))
        assert spelled == text


def test_stacked_layers_are_the_same_layers() -> None:
    graphdef, params = param_tree.split(t5(layers=LAYERS))
    some = {name: p for name, p in params.items() if "layers_2/mlp" not in name}
    stacked = param_tree.stack_layers(dict(some), stack)
    assert stacked["encoder/layers/attention/query/kernel"].shape == (LAYERS, micro.D, micro.D)
    assert "encoder/layers_0/mlp/wo/kernel" in stacked  # the third layer has none
    whole = param_tree.stack_layers(dict(params), stack)
    again = param_tree.split(param_tree.merge(graphdef, whole))[1]
    assert again.keys() == params.keys()
    jax.tree.map(np.testing.assert_array_equal, dict(again), dict(params))


def test_the_gate_of_a_gated_mlp_is_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """On accelerators the backward pass computes it again; the gradient is the same."""
    config = dataclasses.replace(ONE_LAYER, mlp_dim=256)
    x_BTD = jnp.ones((1, 64, config.embed_dim))
    found = []
    for on_cpu in (True, False):
        monkeypatch.setattr(layers, "for_cpu", lambda on_cpu=on_cpu: on_cpu)
        mlp = layers.Mlp(
            config,
            ("gelu", "linear"),
            dtype=jnp.float32,
            param_dtype=jnp.float32,
            dropout_rate=0.0,
            rngs=nnx.Rngs(0),
        )

        def loss(x_BTD: jax.Array, mlp: layers.Mlp = mlp) -> jax.Array:
            y_BTD, _ = jax.lax.scan(lambda x, _: (x + mlp(x), None), x_BTD, None, length=8)
            return (y_BTD**2).sum()

        compiled = jax.jit(jax.grad(loss)).lower(x_BTD).compile()
        found.append((compiled.memory_analysis().temp_size_in_bytes, compiled(x_BTD)))
    (stored, stored_gradient), (again, again_gradient) = found
    assert again < stored / 2
    np.testing.assert_allclose(again_gradient, stored_gradient, rtol=1e-5)
