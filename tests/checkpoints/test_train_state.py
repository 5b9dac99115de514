import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.checkpoints.train_state import restore_latest, save
from prompt_tuning_jax.errors import UserError
from tests.devices import device_flags

ROOT = Path(__file__).parents[2]


class Moments(NamedTuple):
    count: Any
    v: Any
    empty: tuple[()] = ()


def state_at(step: int) -> dict[str, Any]:
    """A state like a run's: every leaf depends on the step."""
    random = np.random.default_rng(step)
    prompt = random.standard_normal((2, 5, 8), np.float32)
    return {
        "params": {"encoder/prompt": jnp.asarray(prompt)},
        "optimizer": (Moments(jnp.int32(step), {"a": jnp.asarray(prompt**2)}), None),
        "key": jax.random.PRNGKey(step),
        "low": jnp.asarray(prompt, jnp.bfloat16),
        "best": np.asarray(prompt[0], np.float64),
        "steps": np.int64(step),
    }


def assert_identical(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert isinstance(a, jax.Array) == isinstance(b, jax.Array)
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


def steps_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_restores_the_last_state_bit_for_bit(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    for step in (3, 10):
        extra = {"step": step, "best": [0.5, None], "inf": float("inf"), "name": "ü"}
        assert save(folder, step, state_at(step), extra)
    abstract = jax.eval_shape(lambda: {k: v for k, v in state_at(0).items() if k != "best"})
    like = abstract | {"best": np.zeros((5, 8)), "steps": np.int64(0)}
    for description in (state_at(0), like):
        restored = restore_latest(folder, description)
        assert restored is not None
        step, state, got = restored
        assert (step, got) == (10, {**extra, "inf": None})  # as JSON has it
        assert_identical(state, state_at(10))


def test_nothing_saved(tmp_path: Path) -> None:
    assert restore_latest(tmp_path / "none", state_at(0)) is None
    assert not (tmp_path / "none").exists()
    assert restore_latest(tmp_path, state_at(0)) is None


def test_keeps_the_last_steps(tmp_path: Path) -> None:
    for step in range(5):
        save(tmp_path, step, state_at(step), {}, keep=3)
    assert steps_in(tmp_path) == ["2", "3", "4"]
    save(tmp_path, 7, state_at(7), {}, keep=1)
    assert steps_in(tmp_path) == ["7"]


def test_a_saved_step_is_not_written_again_and_steps_do_not_go_back(tmp_path: Path) -> None:
    save(tmp_path, 5, state_at(5), {"first": True})
    assert not save(tmp_path, 5, state_at(6), {"first": False})
    with pytest.raises(UserError, match="has step 5, which is later than 4"):
        save(tmp_path, 4, state_at(4), {})
    restored = restore_latest(tmp_path, state_at(0))
    assert restored is not None
    assert restored[2] == {"first": True}
    assert_identical(restored[1], state_at(5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": jnp.zeros(3, jnp.uint32)}, r"key is uint32\[2\] there and uint32\[3\] here"),
        ({"low": jnp.zeros((2, 5, 8))}, r"low is bfloat16\[2, 5, 8\] there and float32"),
        ({"params": {"other": jnp.zeros(3)}}, "params/other is absent there"),
        ({"more": jnp.zeros(3)}, "more is absent there"),
        ({"params": {}}, r"params/encoder/prompt is float32\[2, 5, 8\] there and absent here"),
    ],
)
def test_another_runs_state(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    save(tmp_path, 1, state_at(1), {})
    with pytest.raises(UserError, match=message) as caught:
        restore_latest(tmp_path, state_at(0) | change)
    assert str(tmp_path / "1") in str(caught.value)


def test_what_a_kill_leaves_is_ignored_by_readers_and_removed_by_the_next_save(
    tmp_path: Path,
) -> None:
    for step in (1, 2):
        save(tmp_path, step, state_at(step), {"step": step})
    # A save that was cut short, and an old step that was being removed.
    shutil.copytree(tmp_path / "2", tmp_path / "3.orbax-checkpoint-tmp")
    shutil.rmtree(tmp_path / "1" / "state")
    restored = restore_latest(tmp_path, state_at(0))
    assert restored is not None
    assert restored[0] == 2
    assert (tmp_path / "3.orbax-checkpoint-tmp").exists()
    save(tmp_path, 3, state_at(3), {"step": 3})
    assert steps_in(tmp_path) == ["2", "3"]
    restored = restore_latest(tmp_path, state_at(0))
    assert restored is not None
    assert_identical(restored[1], state_at(3))


@pytest.mark.parametrize(
    "lost", ["state/manifest.ocdbt", "state/_METADATA", "_CHECKPOINT_METADATA"]
)
def test_a_damaged_step_is_one_line(tmp_path: Path, lost: str) -> None:
    save(tmp_path, 1, state_at(1), {})
    (tmp_path / "1" / lost).unlink()
    with pytest.raises(UserError, match="is damaged") as caught:
        restore_latest(tmp_path, state_at(0))
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the training state to"):
        save(tmp_path / "file" / "run", 1, state_at(1), {})
    with pytest.raises(TypeError):
        save(tmp_path / "run", 1, state_at(1), {"array": np.zeros(3)})
    with pytest.raises(ValueError, match="keep"):
        save(tmp_path / "run", 1, state_at(1), {}, keep=0)
    assert not (tmp_path / "run").exists()


def test_a_save_is_quick(tmp_path: Path) -> None:
    state = {"prompt": jnp.ones((5, 100, 768)), "v": jnp.ones((5, 100, 768))}
    save(tmp_path, 0, state, {})  # imports orbax
    times = []
    for step in (1, 2, 3):
        start = time.perf_counter()
        save(tmp_path, step, state, {})
        times.append(time.perf_counter() - start)
    assert min(times) < 0.3


def run_python(code: str, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
    names = {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | names | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


SAVES_UNTIL_KILLED = """
import sys
from test_train_state import assert_identical, restore_latest, save, state_at

step = 0
restored = restore_latest(sys.argv[1], state_at(0))
if restored:
    step, state, extra = restored
    assert_identical(state, state_at(step))
    assert extra == {"step": step}
print(step, flush=True)
while True:
    step += 1
    save(sys.argv[1], step, state_at(step), {"step": step})
    print(step, flush=True)
"""


def test_survives_kills_at_any_time(tmp_path: Path) -> None:
    moments = random.Random(0)
    done = 0
    for _ in range(3):
        child = run_python(SAVES_UNTIL_KILLED, str(tmp_path))
        assert child.stdout is not None
        first = child.stdout.readline()
        if first:
            time.sleep(moments.uniform(0.7, 1.2) if not done else moments.uniform(0, 0.9))
            child.send_signal(signal.SIGKILL)
        output, errors = child.communicate()
        assert errors == ""
        assert int(first) >= done  # what was reported as saved is there
        done = int((first + output).split()[-1])
    assert done > 0
    restored = restore_latest(tmp_path, state_at(0))
    assert restored is not None
    step, state, extra = restored
    assert step in (done, done + 1)  # the last report may not have come out
    assert extra == {"step": step}
    assert_identical(state, state_at(step))


ON_A_MESH = """
import sys
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_train_state import restore_latest, save

def placed(shape, *spec):
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    return NamedSharding(mesh, PartitionSpec(*spec))

values = np.arange(4 * 6, dtype=np.float32).reshape(4, 6)
state = {
    "prompts": jax.device_put(values, placed((2, 2), "data", "model")),
    "v": jax.device_put(values + 1, placed((2, 2), None, "model")),
    "step": jax.device_put(np.int32(3), placed((2, 2))),
}
save(sys.argv[1], 3, state, {})
same = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
other = {
    name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placed((4, 1), *["data"][: a.ndim]))
    for name, a in state.items()
}
single = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state)
for like in (state, same, other, single):
    _, restored, _ = restore_latest(sys.argv[1], like)
    for name, array in restored.items():
        np.testing.assert_array_equal(array, state[name])
        if like[name].sharding is not None:
            assert array.sharding == like[name].sharding, name
print("fine")
"""


def test_sharded_states_onto_the_same_and_another_mesh(tmp_path: Path) -> None:
    output, errors = run_python(ON_A_MESH, str(tmp_path), XLA_FLAGS=device_flags(4)).communicate()
    assert output == "fine\n", errors
    assert errors == ""
