"""The table of axes, the mesh, and one training step on eight devices against one."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from prompt_tuning_jax.cli.experiment import mesh_overrides
from prompt_tuning_jax.config.experiment import Experiment, Mesh
from prompt_tuning_jax.config.field_syntax import MESH_AXES, parse_rules
from prompt_tuning_jax.config.overrides import apply_overrides
from prompt_tuning_jax.config.validation import validate
from prompt_tuning_jax.distributed.sharding import (
    RULES,
    Partitioner,
    activation_sharding,
    logical_to_mesh_axes,
    make_mesh,
    on_host,
    with_logical_constraint,
    with_rules,
)
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.setup import attach_members, build_model
from tests import tiny_run
from tests.devices import with_devices


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
    assert logical_to_mesh_axes(axes) == PartitionSpec(*spec)


def test_an_axis_that_the_table_does_not_know_is_a_mistake():
    with pytest.raises(KeyError, match="embd"):
        logical_to_mesh_axes(("vocab", "embd"))


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


@dataclass(frozen=True)
class Device:
    """What a mesh of several hosts is made of, as far as its order goes."""

    id: int
    process_index: int
    slice_index: int | None = None
    platform: str = "cpu"
    device_kind: str = "cpu"


def test_slices_follow_each_other_along_their_axis(monkeypatch):
    monkeypatch.setattr(jax.sharding, "Mesh", lambda devices, *_, **__: devices)
    # Of every process two devices; interleaved, as they may well be numbered.
    hosts = [Device(id=i, process_index=i % 4) for i in range(8)]
    grid = make_mesh(data=1, model=2, dcn_data=2, dcn_fsdp=2, devices=hosts)
    assert grid.shape == (2, 2, 2)
    for along_model in grid.reshape(-1, 2):
        assert len({device.process_index for device in along_model}) == 1
    slices = [Device(id=i, process_index=i // 2, slice_index=i // 4) for i in range(8)]
    grid = make_mesh(data=1, fsdp=-1, dcn_data=2, devices=slices)
    assert [[d.slice_index for d in half.flat] for half in grid] == [[0] * 4, [1] * 4]
    with pytest.raises(UserError, match="is 4 and there are 2 slices"):
        make_mesh(dcn_data=4, devices=slices)
    with pytest.raises(UserError, match="dcn_data=3 does not fit 8 devices"):
        make_mesh(dcn_data=3, devices=hosts)


def test_rules_of_a_user_change_the_table():
    rules = with_rules(("vocab=", "prompt_embed=model", "batch=data+fsdp", "rank=fsdp"))
    assert logical_to_mesh_axes(("vocab", "embed"), rules) == PartitionSpec(None, "fsdp")
    assert logical_to_mesh_axes(("prompt", "prompt_embed"), rules) == PartitionSpec(None, "model")
    assert logical_to_mesh_axes(("batch", "rank"), rules) == PartitionSpec(("data", "fsdp"), None)
    assert RULES["vocab"] == "model"
    assert Partitioner(mesh=make_mesh(), rules=rules) != Partitioner(mesh=make_mesh())
    assert hash(Partitioner(mesh=make_mesh())) == hash(
        Partitioner(mesh=make_mesh(), rules=with_rules(()))
    )


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("embed", "is not AXIS=MESH_AXIS"),
        ("=fsdp", "is not AXIS=MESH_AXIS"),
        ("embed=tensor", "mesh axes of data, fsdp, model"),
        ("embed=fsdp+fsdp", "each once"),
        ("embed=fsdp,embed=", "'embed' twice"),
    ],
)
def test_rules_that_make_no_sense(rule, message):
    with pytest.raises(UserError, match=message):
        parse_rules(rule.split(","))
    with pytest.raises(UserError, match=message):
        validate(Experiment(mesh=Mesh(rules=tuple(rule.split(",")))))


def test_a_rule_for_an_axis_that_nothing_has_is_a_mistake(tmp_path):
    experiment = tiny_run.experiment(tmp_path, {"mesh.rules": ("embd=fsdp",)})
    model = build_model(experiment)
    with pytest.raises(UserError, match="no array has the axis 'embd': did you mean 'embed'"):
        attach_members(experiment, model, labels=("red",))


def test_the_mesh_as_an_option():
    overrides = mesh_overrides("data=2, model=4,dcn_data=3")
    mesh = apply_overrides(Experiment(mesh=Mesh(fsdp=5)), overrides).mesh
    assert mesh == Mesh(data=2, fsdp=5, model=4, dcn_data=3)
    for wrong in ("data", "data=", "data=two", "rules=4", "data=2;model=4"):
        with pytest.raises(UserError, match="is not AXIS=NUMBER; axes are data, fsdp, model"):
            mesh_overrides(wrong)


def test_without_a_mesh_nothing_is_constrained_or_moved():
    x = jax.numpy.ones((4, 3))
    with activation_sharding(Partitioner(mesh=make_mesh())):
        assert with_logical_constraint(x, ("batch", None)) is x
    assert with_logical_constraint(x, ("batch", None)) is x
    assert Partitioner(mesh=make_mesh()).shard_batch({"x": x}, ("batch", "length"))["x"] is x
    np.testing.assert_array_equal(on_host({"x": x})["x"], x)


EIGHT_DEVICES = """
import jax, numpy as np
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from prompt_tuning_jax import param_tree
from prompt_tuning_jax.methods.prompt import with_prompt
from prompt_tuning_jax.methods import PromptTuning
from prompt_tuning_jax.distributed.sharding import make_mesh, shard
from tests.micro import D, ONE_LAYER, make_t5, normal

assert len(jax.devices()) == 8
mesh = make_mesh(data=-1, fsdp=2, model=2)
assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "model": 2}
tuned = with_prompt(make_t5(ONE_LAYER), normal(3, D), PromptTuning(length=3))
before = param_tree.split(tuned)[1]
sharded = shard(before, param_tree.logical_axes(tuned), mesh)
assert sharded.keys() == before.keys()
for name, array in sharded.items():
    np.testing.assert_array_equal(array, before[name])
placed = sharded["model/encoder/layers_0/mlp/wi_0/kernel"]
assert placed.sharding.spec == PartitionSpec("fsdp", "model")
assert placed.addressable_shards[0].data.shape == (8, 16)

# Each process gives the rows that its devices hold, in whatever order these come.
from prompt_tuning_jax.distributed.sharding import Partitioner
partitioner = Partitioner(mesh=jax.sharding.Mesh(np.array(jax.devices())[::-1].reshape(2, 2, 2), (
    "data", "fsdp", "model")))
rows = partitioner.rows(8)
np.testing.assert_array_equal(rows, np.arange(8))
batch = np.arange(48).reshape(2, 8, 3)
AXES = ("ensemble", "batch", "length")
placed = partitioner.shard_rows(batch[:, rows], AXES, rows=rows, batch_size=8)
np.testing.assert_array_equal(placed, batch)
assert placed.sharding.spec == PartitionSpec(None, ("data", "fsdp"), None), placed.sharding
assert placed.addressable_shards[0].data.shape == (2, 2, 3)

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


def test_eight_devices_hold_their_parts():
    environment = with_devices(8)
    done = subprocess.run(
        [sys.executable, "-c", EIGHT_DEVICES],
        cwd=Path(__file__).resolve().parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
