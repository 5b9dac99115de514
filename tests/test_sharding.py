"""The table of axes, the mesh, and one training step on eight devices against one."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import AxisType, PartitionSpec

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.sharding import MESH_AXES, RULES, make_mesh, spec_of


def test_the_table_names_mesh_axes_only():
    for rule in RULES.values():
        for axis in (rule,) if isinstance(rule, str) else rule or ():
            assert axis in MESH_AXES


@pytest.mark.parametrize(
    ("axes", "spec"),
    [
        ((), ()),
        (("vocab", "embed"), ("model", "fsdp")),
        (("embed", "joined_kv"), ("fsdp", "model")),
        (("batch", "length"), (("data", "fsdp"), None)),
        ((None, "mlp"), (None, "model")),
        # A mesh axis is used once; the first dimension has it.
        (("batch", "embed"), (("data", "fsdp"), None)),
        (("embed", "batch"), ("fsdp", "data")),
        (("heads", "mlp", "vocab"), ("model", None, None)),
        (("prompt", "prompt_embed"), (None, None)),
    ],
)
def test_spec_of(axes, spec):
    assert spec_of(axes) == PartitionSpec(*spec)


def test_an_axis_that_the_table_does_not_know_is_a_mistake():
    with pytest.raises(KeyError, match="embd"):
        spec_of(("vocab", "embd"))


def test_the_mesh_takes_all_devices():
    mesh = make_mesh()
    assert mesh.axis_names == MESH_AXES and mesh.size == len(jax.devices())
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": -1, "fsdp": -1}, "at most one may be -1"),
        ({"data": 0}, "must be positive"),
        ({"model": -2}, "must be positive"),
        ({"data": 3, "fsdp": 1, "model": 1}, "mesh data=3, fsdp=1, model=1 does not fit 8 devices"),
        ({"data": -1, "model": 3}, "does not fit 8 devices"),
        ({"data": -1, "model": 16}, "mesh data=1, fsdp=1, model=16 does not fit 8 devices"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(**sizes, devices=jax.devices() * 8)


EIGHT_DEVICES = """
import jax, numpy as np
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from prompt_tuning_jax import tree
from prompt_tuning_jax.experiment import Optimizer
from prompt_tuning_jax.methods import PROMPT, PromptTuning
from prompt_tuning_jax.sharding import make_mesh, shard
from tests.micro import D, ONE_LAYER, Trainer, make_batch, make_t5, normal

def run(mesh):
    method, prompt, model = PromptTuning(length=3), normal(3, D), make_t5(ONE_LAYER)
    trainer = Trainer(method, Optimizer(name="sgd"), [prompt], model=model, dropout=False)
    axes = tree.logical_axes(method.with_prompt(model, prompt))
    before = trainer.frozen
    if mesh is not None:
        trainer.frozen = shard(before, axes, mesh)
        assert trainer.frozen.keys() == before.keys()
        for name, array in trainer.frozen.items():
            assert array.shape == before[name].shape
        placed = trainer.frozen["model/encoder/layers_0/mlp/wi_0/kernel"]
        assert placed.sharding.spec == PartitionSpec("fsdp", "model")
        assert placed.addressable_shards[0].data.shape == (8, 16)
    trainer.run([make_batch(rows=8, seed=i) for i in range(2)])
    return np.asarray(trainer.state.tuned[PROMPT])

assert len(jax.devices()) == 8
mesh = make_mesh(data=-1, fsdp=2, model=2)
assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "model": 2}
np.testing.assert_allclose(run(mesh), run(None), atol=1e-4)

# What its mesh axes do not divide is kept whole; the rest is still split.
arrays = {"w": jnp.ones((7, 4)), "v": jnp.ones((4, 3))}
odd = shard(arrays, {"w": ("vocab", "embed"), "v": ("embed", "vocab")}, mesh)
assert odd["w"].sharding.spec == PartitionSpec(None, "fsdp"), odd["w"].sharding
assert odd["v"].sharding.spec == PartitionSpec("fsdp", None), odd["v"].sharding
try:
    shard({"w": jnp.ones((8, 4))}, {}, mesh)
except KeyError:
    pass
else:
    raise AssertionError("a parameter without axes was placed")
"""


def test_eight_devices_train_as_one_does():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-c", EIGHT_DEVICES],
        cwd=Path(__file__).resolve().parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
