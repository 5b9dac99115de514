"""Model tuning and no tuning: the two ends of the switch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.config.experiment import Experiment, Optimizer
from prompt_tuning_jax.inference.setup import attach_unplaced
from prompt_tuning_jax.methods import (
    Context,
    FullTuning,
    LoRA,
    NoTuning,
    PatternTuning,
    PromptTuning,
    attach_method,
    trainable_mask,
)
from prompt_tuning_jax.models.losses import token_sums
from tests.micro import ONE_LAYER, Trainer, call, make_batch, make_t5, shifted
from tests.tiny_vit import LABELS, make_vit

SGD = Optimizer(name="sgd", learning_rate=0.1, weight_decay=0.0)


def attached(method, model):
    return attach_method(model, method, key=jax.random.key(0), context=Context())


def test_neither_adds_a_parameter_or_changes_the_model():
    model, batch = make_t5(ONE_LAYER), {name: x[0] for name, x in make_batch().items()}
    inputs, targets = batch["inputs"], batch["targets"]
    for method in (FullTuning(), NoTuning()):
        graphdef, params = param_tree.split(attached(method, model))
        assert params.keys() == {f"model/{name}" for name in param_tree.split(model)[1]}
        logits = jax.jit(lambda p, g=graphdef: param_tree.merge(g, p)(inputs, targets))(params)
        np.testing.assert_allclose(logits, call(model, inputs, shifted(targets)), atol=1e-5)


def test_full_trains_all_and_none_nothing():
    params = param_tree.split(attached(FullTuning(), make_t5()))[1]
    assert all(trainable_mask(FullTuning(), list(params)).values())
    assert not any(trainable_mask(NoTuning(), list(params)).values())


def test_a_step_of_model_tuning_moves_every_array_down_its_gradient():
    model = make_t5(ONE_LAYER)
    trainer = Trainer(FullTuning(), SGD, model=model, dropout=False)
    before = {name: np.asarray(p[0]).copy() for name, p in trainer.state.trainable.items()}
    assert not trainer.frozen
    batch = make_batch()
    graphdef, params = param_tree.split(model)

    def loss(params):
        logits = param_tree.merge(graphdef, params)(
            batch["inputs"][0], shifted(batch["targets"][0])
        )
        sums = token_sums(logits, batch["targets"][0])
        return sums.loss / sums.tokens

    gradients = jax.jit(jax.grad(loss))(params)
    (first,) = trainer.run([batch])
    assert len(gradients) == len(before) > 25
    for name, gradient in gradients.items():
        after = np.asarray(trainer.state.trainable[f"model/{name}"][0])
        assert np.abs(gradient).max() > 0, name
        np.testing.assert_allclose(after, before[f"model/{name}"] - 0.1 * gradient, atol=1e-5)
    last = trainer.run([batch] * 20)[-1]
    assert last.loss_E[0] < 0.7 * first.loss_E[0]
    assert {p.dtype for p in trainer.state.trainable.values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("method", "model"),
    [
        (FullTuning(), make_t5),
        (PatternTuning(patterns=(".*/wo/kernel",)), make_t5),
        (LoRA(rank=1, parameters=(".*/scale",)), make_t5),
        (PromptTuning(length=2, init="uniform"), make_vit),
    ],
    ids=["full", "pattern", "parameters beside LoRA", "classifier"],
)
def test_weights_that_train_are_float32_in_a_model_of_bfloat16(method, model):
    experiment = Experiment(method=method)
    narrow = model(param_dtype="bfloat16")
    members, _ = attach_unplaced(experiment, narrow, labels=LABELS)
    assert {array.dtype for array in members.trainable.values()} == {jnp.dtype("float32")}
    assert {array.dtype for array in members.frozen.values()} <= {jnp.dtype("bfloat16")}
    for name, array in param_tree.split(narrow)[1].items():
        if (own := members.trainable.get(f"model/{name}")) is not None:
            np.testing.assert_array_equal(own[0], array)
