"""Prompt tuning: what it adds, what trains, and that everything else stays bit-identical."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.config.experiment import Optimizer
from prompt_tuning_jax.distributed.sharding import RULES
from prompt_tuning_jax.methods import PROMPT, Context, PromptTuning, attach_method, trainable_mask
from prompt_tuning_jax.methods.prompt import with_prompt
from tests.micro import (
    ONE_LAYER,
    D,
    Trainer,
    Words,
    call,
    make_batch,
    make_t5,
    normal,
    shifted,
    token_rows,
)

SOURCE = token_rows([5, 3], 7)
TARGET = token_rows([4, 6], 6, seed=1)
OPTIMIZERS = {
    "adafactor": Optimizer(),
    "adafactor scaled": Optimizer(multiply_by_parameter_scale=True, min_dim_size_to_factor=2),
    "adamw": Optimizer(name="adamw", learning_rate=0.1, weight_decay=0.1),
    "sgd": Optimizer(name="sgd", learning_rate=0.1, momentum=0.9, gradient_clip_norm=1.0),
}


@pytest.mark.parametrize("shape", [(3, D), (2, 3, D)], ids=["one", "each"])
def test_attached_it_is_the_models_own_prompt(shape):
    model = make_t5(ONE_LAYER)
    prompt = normal(*shape)
    attached = with_prompt(model, prompt, PromptTuning(length=3))
    got = jax.jit(lambda: attached(SOURCE, TARGET))()
    np.testing.assert_allclose(got, call(model, SOURCE, shifted(TARGET), prompt), atol=1e-5)
    context, injections = jax.jit(lambda: attached.read(SOURCE))()
    rest = jax.jit(lambda context: model.write(context, TARGET, injections=injections))(context)
    np.testing.assert_allclose(rest, got, atol=1e-5)
    assert context.hidden_BUD.shape == (2, 10, D) and injections.model_input is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_adds_one_float32_array_that_alone_trains(dtype):
    model = make_t5(ONE_LAYER, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
    method = PromptTuning(length=5, init="sampled_vocabulary")
    attached = attach_method(model, method, key=jax.random.key(0), context=Context())
    _, params = param_tree.split(attached)
    own = {f"model/{name}" for name in param_tree.split(model)[1]}
    assert params.keys() == own | {PROMPT}
    assert params[PROMPT].shape == (5, D) and params[PROMPT].dtype == jnp.float32
    mask = trainable_mask(method, list(params))
    trainable, frozen = param_tree.partition(params, mask)
    assert trainable.keys() == {PROMPT} and frozen.keys() == own
    assert param_tree.count(trainable) == 5 * D
    axes = param_tree.logical_axes(attached)
    assert len(axes[PROMPT]) == 2 and all(axis in RULES for axis in axes[PROMPT])


def test_attach_takes_labels_from_the_task_unless_the_method_names_its_own():
    model, words = make_t5(ONE_LAYER), Words()
    context = Context(labels=("aa", "bc"), vocabulary=words)
    table_VD = np.asarray(param_tree.split(model)[1]["token_embedder/embedding"])

    def rows(**kwargs):
        method = PromptTuning(length=2, init="class_labels", **kwargs)
        return attach_method(model, method, key=jax.random.key(0), context=context).method.prompt_PD

    for labels, got in [(("aa", "bc"), rows()), (("xy", "q"), rows(init_labels=("xy", "q")))]:
        want = np.stack([table_VD[words.encode(label)].mean(axis=0) for label in labels])
        np.testing.assert_allclose(got.get_value(), want, atol=1e-6)


def trained(optimizer, *, model=None, steps=5, **kwargs):
    prompts = [normal(3, D, seed=seed) for seed in (1, 2)]
    trainer = Trainer(
        PromptTuning(length=3), optimizer, prompts, model=model, seeds=(0, 1), **kwargs
    )
    before = {name: np.asarray(p).copy() for name, p in trainer.frozen.items()}
    metrics = trainer.run(make_batch(2, seed=step) for step in range(steps))
    return trainer, before, metrics, prompts


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_after_some_steps_what_is_frozen_is_bit_identical_and_has_no_optimizer_slot(name):
    trainer, before, metrics, prompts = trained(OPTIMIZERS[name])
    assert before.keys() == trainer.frozen.keys() and len(before) > 30
    for path, array in trainer.frozen.items():
        np.testing.assert_array_equal(
            np.asarray(array).view(np.uint32), before[path].view(np.uint32)
        )
    # Everything that the state holds is as large as the prompt at most, and E-fold.
    assert trainer.state.trainable.keys() == {PROMPT}
    allowed = {(2,), (2, 3, D), (2, 1), (2, 3), (2, D)}
    if "scaled" not in name:  # factored: one number a row and a column
        allowed -= {(2, 3), (2, D)}
    shapes = {leaf.shape for leaf in jax.tree.leaves(trainer.state.opt_state)}
    assert shapes <= allowed
    assert {leaf.dtype for leaf in jax.tree.leaves(trainer.state.trainable)} == {
        jnp.dtype("float32")
    }
    moved = np.abs(np.asarray(trainer.state.trainable[PROMPT]) - np.stack(prompts))
    assert (moved > 0).all()
    assert all(np.isfinite(m.loss_E).all() for m in metrics)


def test_a_bfloat16_model_trains_a_float32_prompt_with_small_steps():
    model = make_t5(ONE_LAYER, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    small = Optimizer(name="sgd", learning_rate=1e-5)
    trainer, before, _, prompts = trained(small, model=model, steps=2)
    for path, array in trainer.frozen.items():
        np.testing.assert_array_equal(
            np.asarray(array).view(np.uint16), before[path].view(np.uint16)
        )
    moved = np.asarray(trainer.state.trainable[PROMPT]) - np.stack(prompts)
    assert trainer.state.trainable[PROMPT].dtype == jnp.float32
    assert (moved != 0).mean() > 0.9  # far below what bfloat16 could hold
    assert np.abs(moved).max() < 1e-3


def test_training_lowers_the_loss():
    trainer = Trainer(PromptTuning(length=3), Optimizer(), [normal(3, D)], dropout=False)
    metrics = trainer.run([make_batch(1)] * 40)
    assert metrics[-1].loss_E[0] < 0.8 * metrics[0].loss_E[0]
