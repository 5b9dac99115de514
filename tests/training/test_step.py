"""The training step: many prompts at once, accumulation, normalization, purity."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.config.experiment import Optimizer
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods import PROMPT, Context, FullTuning, PromptTuning
from prompt_tuning_jax.models.losses import token_sums
from prompt_tuning_jax.training.step import Microbatching, step_cost
from tests.micro import ONE_LAYER, D, Trainer, call, make_batch, make_t5, normal, shifted

METHOD = PromptTuning(length=3)
SGD = Optimizer(name="sgd", learning_rate=0.1, weight_decay=0.0)
ADAFACTOR = Optimizer(initial_step=1000)
STARTS = [normal(3, D, seed=1), 0.5 * normal(3, D, seed=2), np.full((3, D), 0.1, np.float32)]
SEEDS, RATES = (5, 0, 7), (0.3, 0.05, 0.1)


def trainer(optimizer=SGD, starts=STARTS[:1], **kwargs):
    kwargs.setdefault("model", make_t5(ONE_LAYER))
    kwargs.setdefault("seeds", tuple(range(len(starts))))
    parts = kwargs.pop("parts", 1)
    kwargs["microbatching"] = Microbatching(num_microbatches=parts)
    return Trainer(METHOD, optimizer, starts, **kwargs)


def prompts(trained):
    return np.asarray(trained.state.trainable[PROMPT])


def member(batch, e):
    return {name: array[e : e + 1] for name, array in batch.items()}


BATCHES = [make_batch(3, seed=step) for step in range(4)]


@pytest.mark.parametrize(
    ("optimizer", "e"),
    [
        (ADAFACTOR, 0),
        (Optimizer(name="adamw", weight_decay=0.1), 1),
        (SGD, 2),
    ],
    ids=["adafactor", "adamw", "sgd"],
)
def test_several_at_once_equal_each_alone(optimizer, e):
    dropped = make_t5(ONE_LAYER, dropout_rate=0.2)
    together = trainer(optimizer, STARTS, model=dropped, seeds=SEEDS, learning_rates=RATES)
    metrics = together.run(BATCHES)
    alone = trainer(
        optimizer, STARTS[e : e + 1], model=dropped,
        seeds=SEEDS[e : e + 1], learning_rates=RATES[e : e + 1],
    )  # fmt: skip
    own = alone.run([member(batch, e) for batch in BATCHES])
    # Batched products may sum in another order; two optimizer steps magnify the last digit.
    np.testing.assert_allclose(prompts(alone)[0], prompts(together)[e], atol=5e-6)
    for ours, theirs in zip(own, metrics, strict=True):
        for field in dataclasses.fields(ours):
            a, b = getattr(ours, field.name), getattr(theirs, field.name)
            np.testing.assert_allclose(a[0], b[e], rtol=1e-4)
    moved = prompts(together) - np.stack(STARTS)
    assert (np.abs(moved).max(axis=(1, 2)) > 1e-3).all()


def test_a_member_does_not_notice_who_is_beside_it():
    dropped = make_t5(ONE_LAYER, dropout_rate=0.2)

    def run(order):
        trained = trainer(
            ADAFACTOR, [STARTS[e] for e in order], model=dropped,
            seeds=tuple(SEEDS[e] for e in order), learning_rates=tuple(RATES[e] for e in order),
        )  # fmt: skip
        trained.run([{name: array[list(order)] for name, array in b.items()} for b in BATCHES])
        return prompts(trained)

    first, other = run((0, 1, 2)), run((0, 2, 2))
    np.testing.assert_array_equal(other[0], first[0])  # to the bit
    np.testing.assert_array_equal(other[1], first[2])
    np.testing.assert_array_equal(other[1], other[2])


@pytest.mark.parametrize(("normalization", "parts"), [("tokens", 2), ("sum", 4)])
def test_accumulation_changes_nothing(normalization, parts):
    # Rows of unequal length, and one that is all padding: means of means would differ.
    batches = [make_batch(2, rows=8, seed=s) for s in range(3)]
    for batch in batches:
        batch["targets"][:, 3] = 0
    kwargs = {"loss_normalization": normalization, "z_loss": 1e-2, "dropout": False}
    at_once = trainer(starts=STARTS[:2], **kwargs)
    in_parts = trainer(starts=STARTS[:2], parts=parts, **kwargs)
    for a, b in zip(at_once.run(batches), in_parts.run(batches), strict=True):
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-5)
    np.testing.assert_allclose(prompts(in_parts), prompts(at_once), atol=2e-6)


def test_many_small_gradients_of_narrow_weights_are_not_lost():
    """Sums in bfloat16 stop growing once an addend is below a 256th of them."""
    batch = make_batch(1, seed=3)
    many = {name: np.repeat(array, 1024 // array.shape[1], axis=1) for name, array in batch.items()}
    rows = many["inputs"].shape[1]
    norms = []
    for parts in (1, rows):
        narrow = Trainer(
            FullTuning(),
            SGD,
            model=make_t5(ONE_LAYER, param_dtype="bfloat16"),
            context=Context(),
            loss_normalization="none",
            microbatching=Microbatching(num_microbatches=parts),
        )
        (metrics,) = narrow.run([many])
        norms.append(float(np.asarray(metrics.gradient_norm_E, np.float32)[0]))
    assert norms[1] == pytest.approx(norms[0], rel=0.01)


def test_accumulation_takes_less_memory_and_is_counted_whole():
    batch = make_batch(rows=64)
    found = {}
    for parts in (1, 8):
        trained = trainer(parts=parts, dropout=False)
        arguments = (trained.step, trained.state, trained.frozen, batch)
        cost = step_cost(*arguments)
        compiled = trained.step.lower(*arguments[1:]).compile()
        found[parts] = cost.flops, compiled.memory_analysis().temp_size_in_bytes
    assert found[8][0] == found[1][0]
    assert found[8][1] < found[1][1] / 4


def test_products_with_unused_results_do_not_count():
    """Narrow products have their own derivative, which computes that of a frozen kernel, too."""
    counts = []
    for dtype in ("float32", "bfloat16"):
        trained = trainer(model=make_t5(ONE_LAYER, dtype=dtype), dropout=False)
        counts.append(step_cost(trained.step, trained.state, trained.frozen, make_batch()).flops)
    assert counts[0] == counts[1] > 0


def test_a_batch_that_cannot_be_divided_is_refused():
    trained = trainer(parts=4)
    with pytest.raises(UserError, match=r"gradient_accumulation.*batch of 6 examples.* 4 "):
        trained.run([make_batch(rows=6)])


def test_each_part_drops_other_things():
    """Four parts of the same row: with one mask for all, they would be as one."""
    dropped = make_t5(ONE_LAYER, dropout_rate=0.5)
    row = {name: np.repeat(array[:, :1], 4, axis=1) for name, array in make_batch().items()}
    losses = []
    for parts, rows in [(4, row), (1, {name: array[:, :1] for name, array in row.items()})]:
        trained = trainer(model=dropped, parts=parts)
        losses.append(float(trained.run([rows])[0].loss_E[0]))
    again = trainer(model=dropped, parts=4).run([row])[0].loss_E[0]
    assert losses[0] == float(again)
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


def test_sum_is_tokens_times_as_far_as_mean_and_the_metric_is_the_mean():
    batch = make_batch()
    tokens = (batch["targets"] > 0).sum()
    steps, losses = {}, {}
    for name in ("tokens", "sum"):
        trained = trainer(loss_normalization=name, z_loss=0.1, dropout=False)
        losses[name] = trained.run([batch])[0]
        steps[name] = prompts(trained)[0] - STARTS[0]
    np.testing.assert_allclose(steps["sum"], tokens * steps["tokens"], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(losses["sum"].loss_E, losses["tokens"].loss_E, rtol=1e-6)
    own = {name: array[0] for name, array in batch.items()}
    logits = call(make_t5(ONE_LAYER), own["inputs"], shifted(own["targets"]), STARTS[0])
    sums = token_sums(logits, own["targets"], z_loss=0.1)
    assert float(losses["sum"].loss_E[0]) == pytest.approx(float(sums.loss / tokens), rel=1e-5)
    assert float(losses["sum"].accuracy_E[0]) == float(sums.correct / sums.examples)
    distance = np.linalg.norm(steps["tokens"])
    assert float(losses["tokens"].update_norm_E[0]) == pytest.approx(distance, rel=1e-4)
    assert float(losses["tokens"].gradient_norm_E[0]) == pytest.approx(10 * distance, rel=1e-4)


def test_the_gradient_is_that_of_the_prompt_alone():
    batch = {name: array[0] for name, array in make_batch().items()}
    model = make_t5(ONE_LAYER)

    def loss(prompt):
        logits = model(batch["inputs"], shifted(batch["targets"]), prompt)
        sums = token_sums(logits, batch["targets"])
        return sums.loss / sums.tokens

    gradient = jax.jit(jax.grad(loss))(jnp.asarray(STARTS[0]))
    trained = trainer(dropout=False)
    trained.run([make_batch()])
    np.testing.assert_allclose(prompts(trained)[0], STARTS[0] - 0.1 * gradient, atol=1e-6)


def test_a_batch_of_nothing_changes_nothing():
    trained = trainer(dropout=False)
    empty = make_batch()
    empty["targets"][:] = 0
    (metrics,) = trained.run([empty])
    np.testing.assert_array_equal(prompts(trained)[0], STARTS[0])
    assert float(metrics.loss_E[0]) == float(metrics.accuracy_E[0]) == 0


def test_the_state_is_donated_and_the_frozen_weights_are_not():
    trained = trainer(Optimizer())
    before = trained.state
    # What a step hands through unchanged (slots of a factored moment that is not used) may live on.
    large = [
        leaf for leaf in jax.tree.leaves((before.trainable, before.opt_state)) if leaf.ndim == 3
    ]
    assert len(large) == 2  # the prompt and its second moment
    trained.run([make_batch()])
    assert all(leaf.is_deleted() for leaf in large)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(trained.frozen))
    assert int(trained.state.step) == 1


@pytest.mark.parametrize("parts", [1, 2])
def test_the_program_reuses_the_state_and_copies_no_frozen_array(parts):
    trained = trainer(Optimizer(), starts=STARTS, parts=parts, dropout=False)
    compiled = trained.step.lower(trained.state, trained.frozen, make_batch(3)).compile()
    prompt = trained.state.trainable[PROMPT]
    moments = [x for x in jax.tree.leaves(trained.state.opt_state) if x.shape == prompt.shape]
    assert len(moments) == 1
    aliased = compiled.memory_analysis().alias_size_in_bytes
    assert aliased >= prompt.nbytes + moments[0].nbytes
    assert aliased < 2 * (prompt.nbytes + moments[0].nbytes)  # none of the frozen ones
    text = compiled.as_text()
    assert re.search(r"parameter\(\d+\).*frozen", text)  # they are told by this name
    assert not re.search(r"copy\(%?frozen", text)


def test_no_frozen_array_is_in_the_state():
    trained = trainer(Optimizer())
    held = sum(leaf.size for leaf in jax.tree.leaves(trained.state))
    assert held < 4 * 3 * D  # the prompt, its second moment, and scalars
    assert param_tree.count(trained.frozen) > 5000


def test_the_step_is_a_pure_function_of_seed_and_step():
    dropped = make_t5(ONE_LAYER, dropout_rate=0.3)
    batch = {name: np.repeat(array, 2, axis=0) for name, array in make_batch().items()}

    def losses(steps=2, **kwargs):
        still = dataclasses.replace(SGD, learning_rate=0.0)  # only dropout makes a difference
        trained = trainer(still, STARTS[:1] * 2, model=dropped, seeds=(0, 1), **kwargs)
        return np.stack([m.loss_E for m in trained.run([batch] * steps)], axis=1).tolist()

    first, other = losses()
    assert [first, other] == losses()
    assert first[0] != first[1]  # another step, another mask
    assert first[0] not in other
    (exact, same), _ = losses(dropout=False)
    assert exact == same not in first


def test_the_schedule_scales_each_members_rate():
    warm = dataclasses.replace(SGD, warmup_steps=4)
    trained = trainer(warm, STARTS[:1] * 2, seeds=(0, 0), learning_rates=(0.1, 0.2), dropout=False)
    batch = {name: np.repeat(array, 2, axis=0) for name, array in make_batch().items()}
    for step in range(5):
        (metrics,) = trained.run([batch])
        rates = metrics.update_norm_E / metrics.gradient_norm_E
        np.testing.assert_allclose(rates, np.array([0.1, 0.2]) * min(1, (step + 1) / 4), rtol=1e-4)


def test_the_cost_of_a_step_counts_all_positions_and_the_products():
    one, three = trainer(), trainer(starts=STARTS)
    batch = make_batch(3, seed=0)
    cost = step_cost(three.step, three.state, three.frozen, batch)
    assert cost.tokens == batch["inputs"].size + batch["targets"].size
    alone = step_cost(one.step, one.state, one.frozen, member(batch, 0))
    assert 3 * alone.tokens == cost.tokens
    assert cost.flops == 3 * alone.flops
    # At least the logits, forward and back, of the targets alone.
    vocabulary = one.frozen["model/decoder/logits_dense/kernel"].shape[1]
    assert alone.flops > 4 * member(batch, 0)["targets"].size * D * vocabulary
    # A plain function has no count.
    plain = lambda *args: three.step(*args)  # noqa: E731
    assert step_cost(plain, three.state, three.frozen, batch).flops == 0
