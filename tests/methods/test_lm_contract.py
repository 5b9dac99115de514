"""What every method keeps to on a decoder-only model; see test_contract for T5."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.config.overrides import from_json, to_json
from prompt_tuning_jax.config.validation import validate
from prompt_tuning_jax.inference.setup import attach_members
from prompt_tuning_jax.methods import METHODS, TunedModel
from prompt_tuning_jax.methods.merging import merge
from tests.method_cases import LABELS, LM_CASES, experiment, model, trained
from tests.micro import make_batch

NAMES = sorted(LM_CASES)
# One of each method is compiled: it shows what the others share.
ONE_OF_EACH = tuple({type(case.method): name for name, case in LM_CASES.items()}.values())
BATCH = {name: np.where(rows[0] == 0, -1, rows[0]) for name, rows in make_batch(1, seed=9).items()}
INPUTS = (BATCH["inputs"], BATCH["targets"])


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef: Any, params: Any) -> jax.Array:
    logits: jax.Array = param_tree.merge(graphdef, params)(*INPUTS)
    return logits


def logits_of(attached: TunedModel) -> np.ndarray:
    return np.asarray(_logits(*param_tree.split(attached)))


@functools.partial(jax.jit, static_argnums=0)
def _bare_logits(graphdef: Any, params: Any) -> jax.Array:
    logits: jax.Array = param_tree.merge(graphdef, params).run(*INPUTS)
    return logits


def bare_logits(given: Any) -> np.ndarray:
    return np.asarray(_bare_logits(*param_tree.split(given)))


def member(name: str, *, after: bool = True) -> TunedModel:
    done = trained(name, lm=True)
    own = {
        key: jnp.asarray(array[1]) for key, array in (done.after if after else done.before).items()
    }
    attached: TunedModel = param_tree.merge(done.members.graphdef, {**done.members.frozen, **own})
    return attached


def test_the_table_has_every_method_that_trains() -> None:
    known = {type(case.method) for case in LM_CASES.values()}
    left_out = {"none", "prompt_design", "described_prompts"}  # nothing trains; other inputs
    assert {cls for name, cls in METHODS.items() if name not in left_out} == known


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_as_many_parameters_as_it_says(name: str) -> None:
    case = LM_CASES[name]
    of = experiment(case.method)
    assert from_json(to_json(of)) == validate(of) == of
    given = model(lm=True)
    graphdef, params = param_tree.split(given)
    members = attach_members(of, given, labels=LABELS)
    assert sum(array[0].size for array in members.trainable.values()) == case.count
    again, same = param_tree.split(given)
    assert again == graphdef and all(same[key] is params[key] for key in params)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_steps_move_every_tuned_array_and_no_frozen_one(name: str) -> None:
    done = trained(name, lm=True)
    assert done.after.keys() == done.members.trainable.keys()
    for key, array in done.after.items():
        assert np.isfinite(array).all() and np.isfinite(done.losses).all(), key
        for own, was in zip(array, done.before[key], strict=True):
            assert (own != was).any(), key
    original = param_tree.split(model(lm=True))[1]
    for key in {f"model/{key}" for key in original} - done.after.keys():
        np.testing.assert_array_equal(
            done.members.frozen[key], original[key.removeprefix("model/")], err_msg=key
        )


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_form_for_inference_computes_the_same(name: str) -> None:
    attached = member(name)
    got = logits_of(attached.for_inference())
    np.testing.assert_allclose(got, logits_of(attached), atol=2e-5)
    before = logits_of(member(name, after=False))
    assert np.abs(got - before).max() > 1e-4  # training has changed something
    method = LM_CASES[name].method
    if method.identity_at_init:
        np.testing.assert_allclose(before, bare_logits(model(lm=True)), atol=1e-5)
    if method.mergeable:  # into kernels and biases
        np.testing.assert_allclose(bare_logits(merge(attached)), got, atol=2e-5)
