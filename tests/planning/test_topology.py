"""Names of slices, chips and meshes."""

import importlib.util

import pytest

from prompt_tuning_jax.config.experiment import Data, Experiment, Mesh, Model, Training
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods import PromptTuning
from prompt_tuning_jax.models.t5.config import PRESETS
from prompt_tuning_jax.planning.plan import candidates, planned_config
from prompt_tuning_jax.planning.report import plan_lines, plan_run
from prompt_tuning_jax.planning.topology import CHIPS, parse_topology, topology_of

has_compiler = importlib.util.find_spec("libtpu") is not None


def test_slices_by_name_and_by_number():
    assert parse_topology("v5e:4x4").chips == 16
    assert parse_topology("v5p:2x2x2").chips == 8
    assert topology_of("v5e", 16).name == "v5e:4x4"
    assert topology_of("v4", 64).name == "v4:4x4x4"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v3:2x2", "unknown TPU 'v3'; choose from v4, v5e, v5p, v6e"),
        ("v5e", "must be KIND:SHAPE"),
        ("v5e:4x", "must be KIND:SHAPE"),
        ("v5e:2x2x2", "v5e has 2 sizes"),
        ("v5p:4x4", "v5p has 3 sizes"),
        ("v5e:0x4", "v5e has 2 sizes"),
        ("", "must be KIND:SHAPE"),
    ],
)
def test_names_of_no_slice_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        parse_topology(name)


def test_numbers_of_chips_that_are_not_offered():
    with pytest.raises(UserError, match="v5e comes in slices of 1, 4, 8, 16"):
        topology_of("v5e", 12)


def test_either_a_slice_or_a_number():
    for both in ({}, {"topology": "v5e:2x2", "chips": 4}):
        with pytest.raises(UserError, match="either --topology"):
            plan_run(Experiment(), **both)


@pytest.mark.skipif(has_compiler, reason="the TPU compiler is installed")
def test_without_the_compiler_the_extra_is_named():
    with pytest.raises(UserError, match=r"prompt_tuning_jax\[tpu\]"):
        parse_topology("v5e:2x2").devices()


def test_candidates_divide_heads_and_batch():
    experiment = Experiment(training=Training(batch_size=8))
    found = candidates(experiment, PRESETS["small"], parse_topology("v5e:4x4"))  # six heads
    assert found
    assert {mesh.model for mesh in found} == {2}
    assert all(mesh.data * mesh.fsdp * mesh.model == 16 for mesh in found)


def test_a_published_size_needs_no_files():
    for name in ("xxl", "t5_1_1_xxl", "t5_1_1_lm100k_xxl"):
        assert planned_config(Experiment(model=Model(name_or_path=name))) == PRESETS["xxl"]


def test_model_flops_by_hand():
    lengths = {"prompt_length": 100, "inputs_length": 512, "targets_length": 16}
    forward = PRESETS["xxl"].forward_flops(rows=32, **lengths)
    weights = 24 * (4 * 4096 * 4096 + 3 * 4096 * 10240)
    assert forward == pytest.approx(2 * 32 * 612 * weights * (1 + 0.026 + 0.174), rel=0.03)


def test_every_chip_says_where_its_numbers_are_from():
    for kind, chip in CHIPS.items():
        assert chip.kind == kind and chip.source.startswith("cloud.google.com/tpu/docs/")
        assert chip.flops / chip.hbm_bandwidth > 100  # FLOPs a byte


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler, reason="libtpu, the TPU compiler, is not installed")
def test_a_plan_for_a_real_slice():
    experiment = Experiment(
        model=Model(name_or_path="tiny", dtype="bfloat16", param_dtype="bfloat16"),
        method=PromptTuning(length=4),
        data=Data(inputs_length=12, targets_length=4),
        training=Training(batch_size=8),
        mesh=Mesh(data=2, model=2),
    )
    made = plan_run(experiment, topology="v5e:2x2", own_mesh=True, evaluate=False)
    best = made.best
    assert best is not None and best.train.flops > 0
    assert best.train.needed_bytes < made.topology.chip.hbm_bytes
    assert any("data" in one.axes for one in best.train.collectives)
    assert "to spare" in "\n".join(plan_lines(made))
