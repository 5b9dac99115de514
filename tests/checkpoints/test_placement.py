import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from prompt_tuning_jax.checkpoints import lazy_arrays as progress_module
from prompt_tuning_jax.checkpoints.hf.flax_msgpack import FlaxArray
from prompt_tuning_jax.checkpoints.lazy_arrays import (
    LazyArray,
    all_finite,
    in_memory,
    put_on_devices,
    read_as,
)
from prompt_tuning_jax.errors import UserError
from tests.devices import with_devices

ROOT = Path(__file__).resolve().parents[2]
ARRAY = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whole_arrays_on_the_default_device(dtype: str) -> None:
    lazy = in_memory(ARRAY, where="here")
    scalar = in_memory(np.float32(3), where="there")
    placed = put_on_devices({"b": lazy, "a": lazy.transposed(), "c": scalar}, dtype=dtype)
    assert list(placed) == ["b", "a", "c"]
    for name, want in (("b", ARRAY), ("a", ARRAY.T), ("c", np.float32(3))):
        assert placed[name].dtype == dtype and not placed[name].committed
        # As JAX itself rounds.
        np.testing.assert_array_equal(placed[name], jnp.asarray(want, dtype))


def test_what_is_placed_is_no_view_of_what_was_read() -> None:
    source = np.zeros(1 << 12, np.float32)
    buffer = memoryview(source).cast("B")
    leaf = FlaxArray(shape=source.shape, dtype="float32", pieces=(buffer,))
    lazy = LazyArray(
        shape=source.shape,
        dtype=source.dtype,
        where="",
        read=lambda index: leaf.read((slice(0, 1 << 12),), source.dtype),
    )
    part = read_as(lazy, (slice(0, 1 << 12),), source.dtype)
    assert not np.shares_memory(part, source)
    placed = put_on_devices({"a": lazy}, dtype="float32")["a"]
    source[:] = 1
    np.testing.assert_array_equal(placed, 0)


def test_parts_are_read_as_asked_and_lie_as_devices_want_them() -> None:
    part = read_as(
        in_memory(ARRAY, where="").transposed(),
        (slice(1, 3), slice(0, 6)),
        np.dtype(ml_dtypes.bfloat16),
    )
    np.testing.assert_array_equal(part, ARRAY.T[1:3].astype(ml_dtypes.bfloat16))
    assert part.flags.c_contiguous and part.ctypes.data % 64 == 0


class Terminal:
    """Standard error, as a terminal or not."""

    def __init__(self, *, is_terminal: bool) -> None:
        self.written: list[str] = []
        self.is_terminal = is_terminal
        self.encoding = "utf-8"

    def isatty(self) -> bool:
        return self.is_terminal

    def write(self, text: str) -> int:
        self.written.append(text)
        return len(text)

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_for_terminals(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    stream = Terminal(is_terminal=is_terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    with progress_module.progress("reading it", total=4_000_000) as report:
        report("encoder/wo", 3_000_000)
    text = "".join(stream.written)
    if is_terminal:
        assert "reading it" in text and "encoder/wo" in text and "3.0/4.0 MB" in text
    else:
        assert not text


# Reads are counted by region; a process must read what its own devices hold, each part once.
MANY_DEVICES = """
import sys
import jax, numpy as np
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from prompt_tuning_jax import param_tree
from prompt_tuning_jax.distributed import sharding
from prompt_tuning_jax.checkpoints.lazy_arrays import LazyArray
from prompt_tuning_jax.checkpoints.load import load_model
from prompt_tuning_jax.checkpoints.lazy_arrays import put_on_devices

process, processes, address = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, processes, process)
assert len(jax.devices()) == 8
whole = np.arange(16 * 12, dtype=np.float32).reshape(16, 12)

def recorded(reads):
    def read(index):
        reads.append(tuple(part.indices(size)[:2] for part, size in zip(index, whole.shape)))
        return whole[index]
    return LazyArray(shape=whole.shape, dtype=whole.dtype, where="w", read=read)

def check(mesh, spec, expected):
    reads = []
    layout = NamedSharding(mesh, PartitionSpec(*spec))
    placed = put_on_devices({"w": recorded(reads)}, dtype="bfloat16", shardings={"w": layout})["w"]
    assert placed.sharding == layout and placed.dtype == jnp.bfloat16
    for shard in placed.addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[shard.index].astype(jnp.bfloat16))
    assert sorted(reads) == sorted(expected), (reads, expected)

rows = lambda number: [((at, at + 16 // number), (0, 12)) for at in range(0, 16, 16 // number)]
def mine(parts):
    return parts[process * len(parts) // processes : (process + 1) * len(parts) // processes]

by_model = sharding.make_mesh(data=1, model=8)
check(by_model, ("model", None), mine(rows(8)))
check(by_model, (None, None), rows(1))
both = sharding.make_mesh(data=2, model=4)
# Each process has one of the two copies; one process alone reads only one for both.
check(both, ("model", None), rows(4))
blocks = [((r, r + 8), (c, c + 3)) for r in (0, 8) for c in (0, 3, 6, 9)]
check(both, ("data", "model"), mine(blocks))

for path in sys.argv[4:]:
    want = param_tree.split(load_model(path))[1] if processes == 1 else None
    for mesh in (by_model, both, sharding.make_mesh(fsdp=2, model=4), sharding.make_mesh(fsdp=8)):
        model = load_model(path, mesh=mesh)
        params = param_tree.split(model)[1]
        layouts = sharding.logical_to_mesh_sharding(
            {name: p.shape for name, p in params.items()}, param_tree.logical_axes(model), mesh
        )
        # Eight do not divide the width of the smallest of them.
        assert mesh.shape["fsdp"] == 8 or any(
            not array.sharding.is_fully_replicated for array in params.values()
        )
        for name, array in params.items():
            assert array.sharding == layouts[name], name
            if want:
                np.testing.assert_array_equal(array, want[name])
if processes == 1:  # what training, evaluation and prediction do
    from prompt_tuning_jax.inference import api
    from prompt_tuning_jax.inference import setup
    from prompt_tuning_jax.config.experiment import Experiment, Mesh

    model = setup.build_model(Experiment(mesh=Mesh(data=2, model=4)))
    wi = model.encoder.layer(0).mlp.wi_0.kernel.get_value()
    assert wi.sharding == NamedSharding(both, PartitionSpec("fsdp", "model"))
    prompt = np.ones((2, model.config.embed_dim), np.float32)
    scores = [api.score(m, ["a b"], ["c"], prompt) for m in (model, load_model("tiny"))]
    np.testing.assert_allclose(*scores, rtol=1e-4)
print("fine")
"""


def start(process: int, processes: int, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", MANY_DEVICES, str(process), str(processes), *arguments],
        cwd=ROOT,
        env=with_devices(8 // processes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_every_layout_from_both_formats_on_eight_devices(shared: Path) -> None:
    t5x = shared / "fixtures" / "t5x"
    paths = (t5x / "tiny_t5x" / "checkpoint_3", t5x / "scan_t5x" / "checkpoint_7")
    here = "prompt_tuning_jax/assets/tiny"
    fused = (shared / "fixtures" / "families" / name for name in ("gpt2", "bloom", "gpt_neox"))
    child = start(0, 1, "", *map(str, (*paths[:1], *fused)), here)
    out, error = child.communicate(timeout=300)
    assert child.returncode == 0 and "fine" in out, error


def test_two_processes_read_what_is_theirs() -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    children = [start(process, 2, address) for process in range(2)]
    for child in children:
        out, error = child.communicate(timeout=300)
        assert child.returncode == 0 and "fine" in out, error


def test_the_default_device_of_this_process_is_enough_for_a_mesh_of_one() -> None:
    from prompt_tuning_jax import param_tree
    from prompt_tuning_jax.checkpoints.load import load_model
    from prompt_tuning_jax.distributed import sharding

    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    params = param_tree.split(load_model("tiny", mesh=mesh))[1]
    assert not any(array.committed for array in params.values())


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_refused_with_file_and_array(dtype: Any, bad: float) -> None:
    good = np.linspace(-3, 3, 140_000).reshape(700, 200).astype(dtype)
    largest = np.full((2, 2), np.finfo(np.float16).max).astype(dtype)
    for fine in (good, good.T, good[::2], largest, good[:0]):
        assert all_finite(fine)
    for row, column in ((0, 0), (699, 199), (350, 7)):
        wrong = good.copy()
        wrong[row, column] = bad
        assert not all_finite(wrong) and not all_finite(wrong.T)
        with pytest.raises(UserError, match=r"^m\.safetensors: a holds NaN or infinity"):
            put_on_devices({"a": in_memory(wrong, where="m.safetensors: a")}, dtype=np.float32)
