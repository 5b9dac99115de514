"""Programs are compiled once for each shape, all of them from the first call on, and kept."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.compilation import CompiledAhead, keep_compiled_programs


def batch(length):
    return {"tokens": np.ones((2, length), np.int32)}


@pytest.fixture
def traced():
    return []


@pytest.fixture
def step(traced):
    @partial(jax.jit, donate_argnums=0)
    def step(state, frozen, batch):
        traced.append(batch["tokens"].shape[1])
        return jax.tree.map(lambda x: x + batch["tokens"].sum() * frozen["w"], state)

    return step


def test_every_named_shape_is_traced_once_and_computes_what_the_function_does(step, traced):
    ahead = CompiledAhead(step, [batch(length) for length in (4, 8, 16)])
    assert traced == []  # a finished run compiles nothing
    state, frozen = {"x": jnp.zeros(())}, {"w": jnp.asarray(2.0)}
    for length in (8, 4, 8, 16, 4):
        given = batch(length)
        ahead.lower(state, frozen, given)
        state = ahead(state, frozen, given)
    assert sorted(traced) == [4, 8, 16] and traced[0] == 8
    assert float(state["x"]) == 2 * 2 * (8 + 4 + 8 + 16 + 4)


def test_other_shapes_compile_when_they_come(step, traced):
    ahead = CompiledAhead(step, [batch(4)])
    frozen = {"w": jnp.asarray(1.0)}
    assert float(ahead({"x": jnp.zeros(())}, frozen, batch(6))["x"]) == 12
    assert traced == [6]
    assert ahead.lower({"x": jnp.zeros(())}, frozen, batch(6)).cost_analysis()["flops"] > 0


def test_the_state_is_donated(step):
    ahead = CompiledAhead(step, [batch(4)])
    state = {"x": jnp.zeros((64, 64))}
    ahead(state, {"w": jnp.asarray(1.0)}, batch(4))
    assert state["x"].is_deleted()


@pytest.fixture
def no_cache_yet(monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    names = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_the_users_cache(no_cache_yet, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_compiled_programs()
    folder = jax.config.jax_compilation_cache_dir
    assert folder.startswith(str(tmp_path / "prompt_tuning_jax" / "compiled"))
    assert os.path.isdir(folder) and jax.config.jax_compilation_cache_max_size > 0


def test_what_the_user_has_set_stays(no_cache_yet, monkeypatch, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")


def test_a_home_that_cannot_be_written_is_no_error(no_cache_yet, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir is None


def test_a_second_process_finds_the_programs_of_the_first(tmp_path):
    program = """
import jax, sys
from prompt_tuning_jax.compilation import keep_compiled_programs
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
keep_compiled_programs()
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
jax.jit(lambda x: x * 3 + 1)(2.0).block_until_ready()
print(hits.count("/jax/compilation_cache/cache_hits"))
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    first, second = (
        subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, check=True
        ).stdout
        for _ in range(2)
    )
    assert int(first) == 0 and int(second) >= 1
