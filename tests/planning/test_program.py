"""Real steps compiled from shapes alone, for eight devices."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from prompt_tuning_jax.config.experiment import Data, Evaluation, Experiment, Model, Training
from prompt_tuning_jax.distributed.sharding import Partitioner, make_mesh
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.setup import attach_members
from prompt_tuning_jax.methods import CPT, WARP, FullTuning, PromptTuning
from prompt_tuning_jax.planning.program import abstract_experiment, compile_eval, compile_train
from prompt_tuning_jax.training import build
from tests.devices import with_devices
from tests.micro import ONE_LAYER, T5_1_1, make_t5

EXPERIMENT = Experiment(
    model=Model(dropout_rate=0.0),
    method=PromptTuning(length=3, init="uniform"),
    data=Data(inputs_length=9, targets_length=4),
    training=Training(batch_size=8, seeds=(0, 1)),
    evaluation=Evaluation(batch_size=8),
)


@pytest.mark.parametrize("method", [PromptTuning(length=3, init="uniform"), FullTuning()])
def test_shapes_are_those_of_the_real_experiment(method):
    experiment = dataclasses.replace(EXPERIMENT, method=method)
    abstract = abstract_experiment(experiment, T5_1_1, Partitioner(mesh=make_mesh()))
    members = attach_members(experiment, make_t5(), labels=())
    state, _, _ = build.build_step(experiment, members)

    def shapes(arrays):
        return jax.tree.map(lambda x: (x.shape, x.dtype), arrays)

    assert shapes(abstract.state) == shapes(state)
    assert shapes(abstract.members.frozen) == shapes(members.frozen)
    assert abstract.members.mask == members.mask


@pytest.mark.parametrize("method", [WARP(length=2), CPT()])
def test_methods_that_need_labels_or_texts_are_not_planned(method):
    experiment = dataclasses.replace(EXPERIMENT, method=method)
    with pytest.raises(UserError, match="plan knows no labels and texts"):
        abstract_experiment(experiment, T5_1_1, Partitioner(mesh=make_mesh()))


EIGHT = """
import dataclasses, json
from prompt_tuning_jax.distributed.sharding import Partitioner
from prompt_tuning_jax.planning.program import abstract_experiment, compile_train
from prompt_tuning_jax.distributed.sharding import make_mesh
from tests.micro import ONE_LAYER
from tests.planning.test_program import EXPERIMENT

found = {}
model = dataclasses.replace(EXPERIMENT.model, dtype="bfloat16", param_dtype="bfloat16")
experiment = dataclasses.replace(EXPERIMENT, model=model)
for sizes in ({"data": 8}, {"data": 4, "model": 2}):
    abstract = abstract_experiment(experiment, ONE_LAYER, Partitioner(mesh=make_mesh(**sizes)))
    train = compile_train(experiment, abstract)
    assert train.fits and train.flops > 0 and train.temporary_bytes > 0
    found[str(sizes["data"])] = [[c.kind, list(c.axes), c.bytes] for c in train.collectives]
print(json.dumps(found))
"""


def test_the_eval_step_compiles_from_shapes():
    for strategy in ("rank", "greedy"):
        experiment = dataclasses.replace(
            EXPERIMENT, evaluation=Evaluation(strategy=strategy, batch_size=8)
        )
        abstract = abstract_experiment(experiment, ONE_LAYER, Partitioner(mesh=make_mesh()))
        program = compile_eval(experiment, abstract)
        assert program.fits and program.flops > 0


def test_only_the_prompts_gradient_and_scalars_cross_data():
    environment = with_devices(8)
    done = subprocess.run(
        [sys.executable, "-c", EIGHT],
        cwd=Path(__file__).resolve().parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    gradient = 2 * 3 * T5_1_1.embed_dim * 4  # of two prompts, float32
    for one in found.values():
        across = sum(size for _, axes, size in one if "data" in axes)
        assert gradient <= across <= gradient + 200, one
    assert all(axes == ["data"] for _, axes, _ in found["8"])
    assert any(axes == ["model"] for _, axes, _ in found["4"])
    # Heads are never gathered: one layer's scores alone would be 2 x 2 x 2 x 12 x 12 numbers.
    assert sum(size for kind, _, size in found["4"] if kind != "all-reduce") < 1000, found["4"]


@pytest.mark.parametrize("vocab_size", [64, 32_128])
def test_prompt_tuning_costs_at_most_seven_tenths_of_model_tuning(vocab_size):
    """By the compiler's count of the optimized step, for encoders that see as many positions."""
    config = dataclasses.replace(
        ONE_LAYER, vocab_size=vocab_size, embed_dim=64, num_heads=4, head_dim=16, mlp_dim=128
    )
    flops = []
    for method, length in ((PromptTuning(length=10), 22), (FullTuning(), 32)):
        experiment = dataclasses.replace(
            EXPERIMENT,
            method=method,
            data=Data(inputs_length=length, targets_length=4),
            training=Training(batch_size=8),
        )
        abstract = abstract_experiment(experiment, config, Partitioner(mesh=make_mesh()))
        program = compile_train(experiment, abstract)
        flops.append(program.flops)
    assert 0.4 < flops[0] / flops[1] <= 0.70, flops
