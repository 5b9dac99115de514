"""What a user sets is used, or refused."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from prompt_tuning_jax.cli.main import main
from prompt_tuning_jax.config.experiment import Data, Experiment, Optimizer, Training
from prompt_tuning_jax.config.no_effect import require_effect
from prompt_tuning_jax.config.overrides import apply_overrides, to_json
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods import LoRA, MultitaskPrompts, PromptDesign, PromptTuning
from tests import tiny_run

OWN = Experiment(data=Data(task="", train="train.jsonl", eval="dev.jsonl"))
TASK = Experiment()
TEXT = Experiment(data=Data(task="", train="texts", objectives=("span_corruption",)))
RATES = Experiment(training=Training(seeds=(0,), learning_rates=(0.1,)))
INITS = Experiment(training=Training(seeds=(0, 1), inits=("uniform", "file=a.npy")))
ADAMW = Experiment(optimizer=Optimizer(name="adamw"))
RSQRT = Experiment(optimizer=Optimizer(schedule="rsqrt"))
MULTITASK = Experiment(method=MultitaskPrompts(combine="sum"))
FALLING = Optimizer(schedule="linear", end_learning_rate=0.01)
BARE = {"command": "eval", "prompts": 1, "bare_prompts": True}


def refused(experiment: Experiment, override: str, **options: Any) -> str:
    """What is said about the override, or nothing."""
    field = override.partition("=")[0]
    experiment = apply_overrides(experiment, [override])
    try:
        require_effect({field: f"--set {field}"}, experiment, **{"command": "train", **options})
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("experiment", "override", "why"),
    [
        (OWN, "data.task=word_valence", "data.train=train.jsonl"),
        (OWN, "data.module=m", "data.train=train.jsonl"),
        (OWN, "data.data_dir=D", "data.train=train.jsonl"),
        (TASK, "data.inputs_column=a", "neither data.train nor data.eval"),
        (TASK, "data.targets_template={a}", "neither data.train nor data.eval"),
        (TASK, "data.noise_density=0.2", "data.objectives is empty"),
        (TEXT, "evaluation.best_by=f1", "evaluated by its loss"),
        (TEXT, "data.max_train_examples=5", "evaluated by its loss"),
        (TASK, "optimizer.beta1=0.8", "it applies to adamw, and optimizer.name is adafactor"),
        (TASK, "optimizer.momentum=0.8", "it applies to sgd"),
        (TASK, "data.separator=;", "neither data.train nor data.eval"),
        (TASK, "evaluation.num_beams=2", "strategy is auto"),
        (TASK, "model.embeddings=cooccurrence", "not random"),
        (RATES, "optimizer.learning_rate=1", "training.learning_rates"),
        (ADAMW, "optimizer.initial_step=9", "it applies to adafactor, and optimizer.name is adamw"),
        (TASK, "optimizer.decay_steps=9", "optimizer.schedule is constant"),
        (RSQRT, "optimizer.end_learning_rate=0.1", "optimizer.schedule is rsqrt"),
        (
            TASK,
            "method.init_text=good or bad",
            "applies to method.init=string or text, and",
        ),
        (TASK, "method.init_path=a.npy", "the method starts from class_labels"),
        (INITS, "method.init_labels=a,b", "the method starts from file, uniform"),
        (MULTITASK, "method.source_task=1", "the method starts from sampled_vocabulary"),
        (MULTITASK, "method.rank=2", "method.combine=low_rank, and method.combine is sum"),
        (MULTITASK, "method.shared_features=2", "method.combine=features or projection"),
        (TASK, "training.wayward_weight=0.1", "training.wayward_text is empty"),
    ],
)
@pytest.mark.parametrize("command", ["train", "eval"])
def test_fields_that_other_fields_make_void(
    experiment: Experiment, override: str, why: str, command: str
) -> None:
    assert why in refused(experiment, override, command=command)


@pytest.mark.parametrize("command", ["eval", "predict"])
@pytest.mark.parametrize(
    "override",
    [
        "method.length=7",
        "method=lora",
        "optimizer.learning_rate=1",
        "training.steps=3",
        "training.seeds=1",
        "training.workdir=w",
        "model.dropout_rate=0.1",
        "data.max_train_examples=5",
        "data.class_weights=balanced",
    ],
)
@pytest.mark.parametrize("prompts", [0, 1])
def test_what_is_of_training(command: str, override: str, prompts: int) -> None:
    assert "has no effect" in refused(TASK, override, command=command, prompts=prompts)
    assert refused(TASK, override, command="train") == ""


@pytest.mark.parametrize(
    ("experiment", "override", "options"),
    [
        (TASK, "data.task=t", {"command": "eval"}),
        (TASK, "data.module=m", {"command": "eval"}),
        (OWN, "data.task=", {}),
        (OWN, "data.inputs_column=a", {}),
        (OWN, "data.header=false", {}),
        (TASK, "data.inputs_template={a}", {"command": "predict"}),
        (TASK, "evaluation.strategy=greedy", {"command": "predict"}),
        (TASK, "model.dtype=bfloat16", {"command": "eval"}),
        (TASK, "mesh.data=2", {"command": "eval"}),
        # How a prompt that is alone in its file is joined is for the user to say.
        (TASK, "method.placement=after_first", BARE),
        (TASK, "method=prompt_design", {"command": "eval"}),
        (Experiment(method=PromptDesign()), "method.shots=2", {"command": "eval"}),
        (Experiment(method=PromptDesign()), "training.seeds=1", {"command": "eval"}),
        (Experiment(method=PromptDesign()), "data.max_train_examples=5", {"command": "eval"}),
        (TASK, "model.param_dtype=bfloat16", {"command": "serve"}),
        (TASK, "data.module=m", {"command": "serve"}),
        # All seeds' rates fall in the proportion of these two.
        (dataclasses.replace(RATES, optimizer=FALLING), "optimizer.learning_rate=1", {}),
        (Experiment(optimizer=FALLING), "optimizer.decay_steps=9", {}),
        (Experiment(method=PromptTuning(init="string")), "method.init_text=good", {}),
        (INITS, "method.init_path=a.npy", {}),
        (Experiment(method=MultitaskPrompts()), "method.rank=2", {}),
        (Experiment(method=LoRA()), "method.rank=2", {}),
        # What varies may be what they depend on.
        (TASK, "method.init_path=a.npy", {"command": "ablate"}),
        (TASK, "optimizer.beta1=0.8", {"command": "ablate"}),
    ],
)
def test_fields_that_are_used(
    experiment: Experiment, override: str, options: dict[str, Any]
) -> None:
    assert refused(experiment, override, **options) == ""


@pytest.mark.parametrize("override", ["data.task=t", "method.length=3", "optimizer.name=sgd"])
def test_the_server_takes_a_model_and_a_mesh(override: str) -> None:
    assert "serve takes" in refused(TASK, override, command="serve")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--set method.length=7", "--set method.length"),
        ("--set method=lora", "--set method"),
        ("--set training.batch_size=3", "--set training.batch_size"),
        ("--set data.task=word_valence", "--set data.task"),
        ("--data_dir D", "--data_dir"),
        ("--set method.placement=prefix", "--set method.placement"),
    ],
)
def test_eval_of_a_run_refuses_them_before_any_work(
    options: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "experiment.json").write_text(to_json(tiny_run.experiment(run)))
    assert main(["eval", "--prompt", str(run), *options.split(" ")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {named} has no effect") and error.count("\n") == 1


def test_another_method_of_a_config_is_no_matter() -> None:
    # A config may have it, as it may have everything: only what is typed is looked at.
    require_effect({}, dataclasses.replace(TASK, method=LoRA()), command="eval", prompts=1)
