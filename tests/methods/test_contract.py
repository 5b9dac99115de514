"""What every method keeps to, whatever it trains: one table, one set of properties."""

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints import train_state
from prompt_tuning_jax.config.overrides import from_json, to_json
from prompt_tuning_jax.config.validation import validate
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.setup import attach_members
from prompt_tuning_jax.methods import (
    METHODS,
    Context,
    MethodConfig,
    TunedModel,
    attach_method,
    trainable_mask,
)
from prompt_tuning_jax.methods.merging import merge
from prompt_tuning_jax.training import build
from prompt_tuning_jax.training.run import train
from prompt_tuning_jax.typing import HostArray
from tests import tiny_run
from tests.devices import with_devices
from tests.method_cases import (
    CASES,
    LABELS,
    LM_CASES,
    ON_A_MESH,
    ONE_OF_EACH,
    experiment,
    model,
    steps_from,
    trained,
)
from tests.micro import call, make_batch, shifted

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(CASES)
# Members alone and killed runs are matters of the step and the run, which see no more of a method
# than names and arrays: one method is enough.
ONE = "lora"
BATCH = {name: array[0] for name, array in make_batch(1, seed=99).items()}
INPUTS = (BATCH["inputs"], BATCH["targets"])


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef: Any, params: Any, source: Any, target: Any) -> jax.Array:
    logits: jax.Array = param_tree.merge(graphdef, params)(source, target)
    return logits


def logits_of(attached: TunedModel) -> HostArray:
    return np.asarray(_logits(*param_tree.split(attached), *INPUTS))


def member(name: str, number: int, *, after: bool = True) -> TunedModel:
    """One of the trained members, or as it was at its start."""
    done = trained(name)
    trainable = done.after if after else done.before
    own = {key: jnp.asarray(array[number]) for key, array in trainable.items()}
    attached: TunedModel = param_tree.merge(done.members.graphdef, {**done.members.frozen, **own})
    return attached


def tuned_of(method: MethodConfig, attached: TunedModel) -> dict[str, HostArray]:
    params = param_tree.split(attached)[1]
    own, _ = param_tree.partition(params, trainable_mask(method, list(params)))
    return {name: np.asarray(array) for name, array in own.items()}


def test_the_table_has_every_method_that_trains() -> None:
    known = {type(case.method) for case in (*CASES.values(), *LM_CASES.values())}
    left_out = {"none", "prompt_design", "described_prompts"}  # nothing trains; other inputs
    left_out.add("cpt")  # for decoder-only models: see LM_CASES
    assert {cls for name, cls in METHODS.items() if name not in left_out} <= known


@pytest.mark.parametrize("name", NAMES)
def test_its_config_is_kept_as_text_and_makes_sense(name: str) -> None:
    of = experiment(CASES[name].method)
    assert from_json(to_json(of)) == validate(of) == of


@pytest.mark.parametrize("name", NAMES)
def test_attaching_leaves_the_model_as_it_was(name: str) -> None:
    given = model()
    graphdef, params = param_tree.split(given)
    attached = attach_method(
        given,
        CASES[name].method,
        key=jax.random.key(0),
        context=Context(labels=LABELS, vocabulary=given.vocabulary),
    )
    again, same = param_tree.split(given)
    assert again == graphdef
    assert all(same[key] is params[key] for key in params) and same.keys() == params.keys()
    # Nor does the attached one hold other weights: the frozen are the same arrays.
    inside = param_tree.split(attached)[1]
    assert all(inside[f"model/{key}"] is params[key] for key in params)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_merged_if_it_says_that_it_can_be(name: str) -> None:
    method, given = CASES[name].method, model()
    context = Context(labels=LABELS, vocabulary=given.vocabulary)
    attached = attach_method(given, method, key=jax.random.key(0), context=context)
    if method.mergeable:
        assert param_tree.split(merge(attached))[1].keys() == param_tree.split(given)[1].keys()
        return
    with pytest.raises(UserError, match="methods that can are described_prompts, full, ia3, lora"):
        merge(attached)


@pytest.mark.parametrize("name", [n for n in ONE_OF_EACH if CASES[n].method.identity_at_init])
def test_at_its_start_the_model_computes_what_it_did(name: str) -> None:
    want = call(model(), INPUTS[0], shifted(INPUTS[1]))
    np.testing.assert_allclose(logits_of(member(name, 1, after=False)), want, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_as_many_parameters_as_it_says(name: str) -> None:
    members = attach_members(experiment(CASES[name].method), model(), labels=LABELS)
    assert sum(array[0].size for array in members.trainable.values()) == CASES[name].count
    assert param_tree.count(members.trainable) == members.number * CASES[name].count


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_steps_move_every_tuned_array_and_no_frozen_one(name: str) -> None:
    done = trained(name)
    assert done.after.keys() == done.members.trainable.keys()
    for key, array in done.after.items():
        assert np.isfinite(array).all(), key
        for own, was in zip(array, done.before[key], strict=True):
            assert (own != was).any(), key
    original = param_tree.split(model())[1]
    frozen = {f"model/{key}" for key in original} - done.after.keys()
    for key in frozen:
        np.testing.assert_array_equal(
            done.members.frozen[key], original[key.removeprefix("model/")], err_msg=key
        )


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_member_takes_nothing_from_those_beside_it(name: str) -> None:
    """Its own start, batches and seed decide, whatever the other one is given."""
    done = trained(name)
    disturbed = {key: array.copy() for key, array in done.before.items()}
    for array in disturbed.values():
        array[0] *= 0.5
    after, losses = steps_from(done, disturbed, first_batch=50)
    for key, array in done.after.items():
        np.testing.assert_array_equal(after[key][1], array[1], err_msg=key)
    np.testing.assert_array_equal(losses[:, 1], done.losses[:, 1])
    assert np.abs(losses[-1, 0] - done.losses[-1, 0]) > 1e-4


def test_members_at_once_train_as_each_alone() -> None:
    """Those of prompt tuning are in training/test_step.py."""
    both, alone = trained(ONE), trained(ONE, (1,))
    for key, array in alone.after.items():
        np.testing.assert_allclose(both.after[key][1], array[0], atol=1e-5, err_msg=key)
    np.testing.assert_allclose(both.losses[:, 1], alone.losses[:, 0], atol=1e-5)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_what_is_folded_and_kept_computes_the_same(name: str, tmp_path: Path) -> None:
    """The tuned arrays alone, saved and read again, put into a newly attached method."""
    attached = member(name, 1)
    for_inference = attached.for_inference()
    method = for_inference.method.config
    kept = tuned_of(method, for_inference)
    train_state.save(tmp_path, 1, {"trainable": kept}, {})
    found = train_state.read_latest(tmp_path)
    assert found is not None
    read = {key.removeprefix("trainable/"): array for key, array in found[1].items()}
    assert read.keys() == kept.keys()
    for key, array in kept.items():
        np.testing.assert_array_equal(read[key], array, err_msg=key)

    fresh = attach_method(model(), method, key=jax.random.key(5), context=Context(labels=LABELS))
    graphdef, params = param_tree.split(fresh)
    param_tree.require_same_shapes(
        read, tuned_of(method, fresh), of="what is kept", and_of="a new one"
    )
    restored = param_tree.merge(
        graphdef, {**params, **{k: jnp.asarray(a) for k, a in read.items()}}
    )
    want = logits_of(attached)
    np.testing.assert_allclose(logits_of(restored), want, atol=2e-5)
    assert np.abs(want - logits_of(member(name, 1, after=False))).max() > 1e-3


@pytest.mark.parametrize("name", [n for n in ONE_OF_EACH if CASES[n].method.uses_rng()])
def test_with_dropout_it_draws_from_the_key_alone(name: str) -> None:
    graphdef, params = param_tree.split(member(name, 0))

    @functools.partial(jax.jit, static_argnums=1)
    def dropped(number: Any, remat: Any) -> jax.Array:
        logits: jax.Array = param_tree.merge(graphdef, params)(
            *INPUTS, key=jax.random.key(number), remat=remat
        )
        return logits

    one = dropped(0, "none")
    np.testing.assert_allclose(dropped(0, "full"), one, atol=1e-5)
    assert np.abs(dropped(1, "none") - one).max() > 1e-3


EIGHT = """
import sys
import jax, numpy as np
from prompt_tuning_jax.config.experiment import Mesh
from tests.method_cases import ON_A_MESH, trained

assert len(jax.devices()) == 8
one = np.load(sys.argv[1])
for name in ON_A_MESH:
    found = trained(name, mesh=Mesh(data=2, fsdp=2, model=2))
    for key, array in found.after.items():
        np.testing.assert_allclose(array, one[f"{name}:{key}"], atol=2e-5, err_msg=f"{name} {key}")
    print(name, flush=True)
"""


@pytest.mark.slow
def test_eight_devices_train_as_one_does(tmp_path: Path) -> None:
    file = tmp_path / "one.npz"
    arrays = {f"{n}:{key}": a for n in ON_A_MESH for key, a in trained(n).after.items()}
    np.savez(file, **arrays)
    done = subprocess.run(
        [sys.executable, "-c", EIGHT, str(file)],
        cwd=ROOT,
        env=with_devices(8, PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == list(ON_A_MESH)


class Killed(BaseException):
    """Nothing handles it, as nothing handles SIGKILL."""


@pytest.mark.slow
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {
        "method": CASES[ONE].method,
        "training.steps": 4,
        "training.save_every": 2,
        "training.eval_every": 2,
    }
    build_step = build.build_step
    killed_at: list[int] = []

    def with_kills(*args: Any, **options: Any) -> Any:
        state, step, rates = build_step(*args, **options)

        def killable(state: Any, *rest: Any) -> Any:
            if int(state.step) in killed_at:
                killed_at.clear()
                raise Killed
            return step(state, *rest)

        return state, killable, rates

    monkeypatch.setattr(build, "build_step", with_kills)
    whole = train(tiny_run.experiment(tmp_path / "whole", changes), quiet=True)
    killed_at.append(3)
    with pytest.raises(Killed):
        train(tiny_run.experiment(tmp_path / "killed", changes), quiet=True)
    again = train(tiny_run.experiment(tmp_path / "killed", changes), quiet=True)
    assert whole.finished and again.finished and again.best == whole.best
    saved = [train_state.read_latest(tmp_path / f / train_state.LAST) for f in ("whole", "killed")]
    assert saved[0] is not None and saved[1] is not None and saved[0][0] == saved[1][0] == 4
    assert saved[0][1].keys() == saved[1][1].keys()
    for key, array in saved[0][1].items():
        np.testing.assert_array_equal(saved[1][1][key], array, err_msg=key)
