"""Computing again in the backward changes memory and time, and nothing else."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.config.experiment import Optimizer
from prompt_tuning_jax.methods import PROMPT, PromptTuning
from tests.micro import ONE_LAYER, D, Trainer, make_batch, make_t5, normal, shifted


def trained(remat: str) -> tuple[np.ndarray, np.ndarray]:
    """The prompt after three steps with dropout, and the losses."""
    trainer = Trainer(
        PromptTuning(length=3),
        Optimizer(name="sgd"),
        [normal(3, D)],
        model=make_t5(ONE_LAYER, dropout_rate=0.1),
        remat=remat,
    )
    metrics = trainer.run([make_batch(seed=seed) for seed in range(3)])
    return np.asarray(trainer.state.trainable[PROMPT]), np.stack([m.loss_E for m in metrics])


def test_policies_train_alike():
    plain = trained("none")
    for remat in ("dots", "full"):
        for ours, expected in zip(trained(remat), plain, strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)


def kept(remat: str) -> list[tuple[int, ...]]:
    """The shapes of what the forward hands to the backward."""
    model = make_t5()

    def loss(prompt_PD):
        batch = make_batch()
        source, target = batch["inputs"][0], shifted(batch["targets"][0])
        return jnp.sum(model(source, target, prompt_PD, remat=remat))

    backward = jax.eval_shape(lambda prompt_PD: jax.vjp(loss, prompt_PD)[1], normal(3, D))
    return [x.shape for x in jax.tree.leaves(backward)]


def test_each_policy_keeps_less():
    none, dots, full = (sum(map(math.prod, kept(remat))) for remat in ("none", "dots", "full"))
    assert none > dots > full


def test_scores_are_computed_again():
    def scores(remat):
        positions = 3 + 7
        return [s for s in kept(remat) if s[-2:] == (positions, positions) and s[0] > 1]

    assert scores("none")
    assert not scores("dots") and not scores("full")
