"""What a plan says where nothing fits, from programs that were not compiled."""

import dataclasses

import pytest

from prompt_tuning_jax.config.experiment import Data, Experiment, Model, Training
from prompt_tuning_jax.config.methods import FullTuning
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.registry import preset
from prompt_tuning_jax.planning import plan as planning
from prompt_tuning_jax.planning.plan import MeshPlan, Plan, _advice, roofline
from prompt_tuning_jax.planning.program import _EXCEEDED, Program
from prompt_tuning_jax.planning.report import plan_as_dict, plan_lines
from prompt_tuning_jax.planning.topology import GIB, parse_topology

V5E = parse_topology("v5e:4x4")


def tried(program: Program) -> MeshPlan:
    walls = roofline(program, V5E.chip, model_flops=1e15, chips=16)
    return MeshPlan(
        mesh={"data": 16, "fsdp": 1, "model": 1},
        remat="none",
        weights_bytes=12 * GIB,
        tuned_bytes=2**20,
        train=program,
        roofline=walls,
        evaluation=None,
        tokens_per_second=1.0,
        attention="xla",
    )


LARGE = tried(Program(fits=False, needed_bytes=20 * GIB))
FITS = tried(Program(fits=True, needed_bytes=9 * GIB, flops=197e12, bytes_accessed=8.19e11))


def test_what_would_help_is_said_from_the_cheapest():
    experiment = Experiment(
        model=Model(param_dtype="bfloat16"), training=Training(batch_size=32, remat="dots")
    )
    advice = list(_advice(experiment, LARGE, V5E))
    assert "training.remat=full" in advice[0] and "none" not in advice[0]
    assert "model.quantization=int8" in advice[1] and "6.0 GiB" in advice[1]
    assert "training.batch_size=10" in advice[2]  # 8 GiB into 3.75
    assert advice[3] == "more chips: about 32 of v5e"
    wide = dataclasses.replace(experiment, model=Model(param_dtype="float32"))
    assert "model.param_dtype=bfloat16" in list(_advice(wide, LARGE, V5E))[1]
    for one in (experiment, wide):  # nothing is frozen in model tuning
        tuned = dataclasses.replace(one, method=FullTuning())
        assert not any("frozen weights" in line for line in _advice(tuned, LARGE, V5E))


def test_a_plan_that_does_not_fit_says_so():
    made = Plan(topology=V5E, parameters=1, steps=3600, tried=(LARGE,), advice=("buy more",))
    text = "\n".join(plan_lines(made))
    assert "does not fit: data=16 needs 20.00 GiB a chip of 15.75" in text and "buy more" in text
    assert plan_as_dict(made)["best"] is None


def test_the_fastest_that_fits_is_the_best():
    made = Plan(topology=V5E, parameters=1, steps=3600, tried=(FITS, LARGE), advice=())
    assert made.best is FITS
    lines = list(plan_lines(made))
    assert "6.75 to spare" in "\n".join(lines)
    # Steps of one second, on sixteen chips.
    training = next(line for line in lines if line.startswith("training "))
    assert "3,600 steps in 1.0 hours, 16.0 chip-hours" in training
    assert plan_as_dict(made)["meshes"][0]["seconds"]["step"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("message", "size"),
    [
        ("required for HLO temporaries (1.00T) exceeds available HBM (15.75G).", ("1.00", "T")),
        ("Ran out of memory in memory space hbm. Used 17.5G of 15.75G hbm.", ("17.5", "G")),
    ],
)
def test_what_the_compiler_asked_for(message, size):
    found = _EXCEEDED.search(message)
    assert found is not None and found.groups() == size


def test_inputs_have_the_length_that_the_window_leaves_them(monkeypatch):
    class Planned(Exception):
        pass

    def candidates(experiment, config, topology):
        raise Planned(experiment.data.inputs_length)

    monkeypatch.setattr(planning, "candidates", candidates)
    config = preset("openai-community/gpt2")
    for inputs, planned in ((500, 500), (2000, 1024 - 100 - 16)):
        data = Data(inputs_length=inputs, targets_length=16)
        with pytest.raises(Planned, match=f"^{planned}$"):
            planning.plan(Experiment(data=data), config, V5E)
    data = Data(inputs_length=500, targets_length=924)
    with pytest.raises(UserError, match="1024 positions: 100 of the prompt and 924 of the target"):
        planning.plan(Experiment(data=data), config, V5E)
