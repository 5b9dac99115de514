"""Runs on inputs of very different lengths, in batches of about equally long ones."""

import dataclasses
import functools
import os
import random
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints import train_state
from prompt_tuning_jax.checkpoints.load import load_model
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.data.batching import task_data
from prompt_tuning_jax.data.batching.buckets import Buckets
from prompt_tuning_jax.data.batching.loader import TrainBatches
from prompt_tuning_jax.inference.api import score
from prompt_tuning_jax.inference.evaluation import evaluate
from prompt_tuning_jax.inference.setup import Members, attach_members, build_model, vocabulary_of
from prompt_tuning_jax.methods import PROMPT, DescribedPrompts
from prompt_tuning_jax.models.losses import token_sums
from prompt_tuning_jax.training import build
from prompt_tuning_jax.training.run import train
from tests import tiny_run
from tests.tiny_run import measurements, outcome

BUCKETS = "24,40"  # and data.inputs_length


@functools.cache
def files() -> tuple[Path, Path]:
    """Training and evaluation examples with 2 to 30 words."""
    made = []
    for seed, number in ((1, 45), (2, 23)):
        draw = random.Random(seed)
        rows = tiny_run.rows(number, seed=seed)
        for row in rows:
            more = draw.choices(tiny_run.WORDS, k=draw.choice([0, 2, 4, 9, 20]))
            row["inputs"] = " ".join([row["inputs"], *more])
        made.append(tiny_run.write_rows(tiny_run.scratch() / f"lengths_{seed}.jsonl", rows))
    return made[0], made[1]


def experiment(workdir: Path | str, changes: dict[str, Any] | None = None) -> Experiment:
    first, second = files()
    fields = {
        "data.train": str(first),
        "data.eval": str(second),
        "data.inputs_length": 64,
        "data.buckets": BUCKETS,
        "training.steps": 14,
        "training.log_every": 4,
        "training.save_every": 5,
        "training.eval_every": 7,
        "evaluation.batch_size": 8,
    }
    return tiny_run.experiment(workdir, {**fields, **(changes or {})})


def data_of(of: Experiment) -> task_data.TaskData:
    words = vocabulary_of(build_model(of))
    data = task_data.build_data(of, words)
    return data


def batches_of(of: Experiment) -> TrainBatches:
    train_batches = data_of(of).train
    assert train_batches is not None
    return train_batches


def test_interrupted_and_continued_it_is_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"training.seeds": (0, 4)}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    build_step, calls = build.build_step, 0

    def watched(of: Experiment, members: Members, **options: Any) -> Any:
        state, step, rates = build_step(of, members, **options)

        def counted(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls in (14 + 3, 14 + 9):
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*arguments)

        return state, counted, rates

    monkeypatch.setattr(build, "build_step", watched)
    assert train(experiment(whole, changes), quiet=True).finished
    steps = []
    for _ in range(3):
        steps.append(train(experiment(killed, changes), quiet=True).step)
    assert steps == [3, 9, 14]
    assert outcome(killed) == outcome(whole)
    shapes = {length for length, _ in map(batches_of(experiment("w")).lengths_for, range(14))}
    assert len(shapes) == 3
    logged = [r for r in measurements(whole) if r["kind"] == "train"]
    batches = batches_of(experiment("w", changes))
    spans = [(0, 4), (4, 8), (8, 12), (12, 14)]
    assert [r["padding_percent"] for r in logged] == [
        round(batches.padding(*span), 2) for span in spans
    ]


def test_prompts_trained_at_once_equal_prompts_trained_alone(tmp_path: Path) -> None:
    """With dropout, whose masks depend on the shape of a batch."""
    sgd = {"optimizer.name": "sgd", "optimizer.weight_decay": 0.0, "optimizer.learning_rate": 0.05}
    few = {
        "model.dropout_rate": 0.1,
        "data.buckets": "24",
        "training.steps": 6,
        "training.eval_every": 6,
    }
    train(experiment(tmp_path / "both", {**sgd, **few, "training.seeds": (3, 7)}), quiet=True)
    train(experiment(tmp_path / "alone", {**sgd, **few, "training.seeds": (7,)}), quiet=True)
    batches = batches_of(experiment("w", {**few, "training.seeds": (7,)}))
    assert {batches.lengths_for(step)[0] for step in range(6)} == {24, 64}
    np.testing.assert_allclose(
        _last_prompt(tmp_path / "both")[1], _last_prompt(tmp_path / "alone")[0], atol=1e-6
    )


def _last_prompt(folder: Path) -> np.ndarray:
    found = train_state.read_latest(folder / "checkpoints/last")
    assert found is not None
    return found[1][f"trainable/{PROMPT}"]


def test_losses_of_examples_are_those_without_buckets() -> None:
    """The same rows at the length of their bucket and at the full one."""
    of = experiment("w")
    batches = batches_of(of)
    model = load_model(str(tiny_run.model_folder()))
    members = attach_members(of, model, labels=tiny_run.LABELS)
    own = {name: array[0] for name, array in members.trainable.items()}
    attached = param_tree.merge(members.graphdef, {**members.frozen, **own})

    @jax.jit
    def logits_of(inputs_BT: jax.Array, targets_BS: jax.Array) -> jax.Array:
        logits_BSV: jax.Array = attached(inputs_BT, targets_BS)
        return logits_BSV

    def losses(batch: dict[str, np.ndarray]) -> np.ndarray:
        rows = {name: jnp.asarray(array[0]) for name, array in batch.items()}
        logits_BSV = logits_of(rows["inputs"], rows["targets"])
        targets_BS = rows["targets"]
        return np.array(
            [
                token_sums(logits_BSV[i : i + 1], targets_BS[i : i + 1], z_loss=0.0).loss
                for i in range(len(targets_BS))
            ]
        )

    seen = set()
    for step in range(8):
        batch = batches[step]
        inputs_EBT = batch["inputs"]
        seen.add(inputs_EBT.shape[-1])
        longer = np.pad(inputs_EBT, ((0, 0), (0, 0), (0, 64 - inputs_EBT.shape[-1])))
        full = {**batch, "inputs": longer}
        np.testing.assert_allclose(losses(batch), losses(full), atol=2e-5)
    assert len(seen) == 3


@pytest.mark.parametrize("strategy", ["rank", "greedy"])
def test_evaluation_is_the_same_in_the_same_order(strategy: str) -> None:
    prompt = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    results = [
        evaluate(
            experiment("w", {"data.buckets": buckets, "evaluation.strategy": strategy}),
            prompts=[prompt],
        )
        for buckets in ("none", "auto", BUCKETS)
    ]
    texts = [next(iter(r.predictions.values())).texts_EN for r in results]
    assert texts[0] == texts[1] == texts[2] and len(texts[0][0]) == 23
    assert results[0].mean == results[1].mean == results[2].mean


def test_predictions_are_of_their_own_inputs() -> None:
    of = experiment("w")
    data = data_of(of)
    (examples,) = data.evaluation.values()
    model = load_model(str(tiny_run.model_folder()))
    prompt = np.random.default_rng(1).normal(size=(5, 16)).astype(np.float32)
    result = evaluate(of, prompts=[prompt])
    known = next(iter(result.predictions.values())).log_probs_EN[0]
    inputs = [example["inputs"] for example in examples.texts]
    whole = examples.inputs.lengths <= 64  # the others are cut
    assert 15 < whole.sum() < len(whole)
    for label in tiny_run.LABELS:
        want = score(model, inputs, [label] * len(inputs), prompt)
        found = np.array([each[label] for each in known])
        np.testing.assert_allclose(found[whole], want[whole], atol=1e-4)


def test_the_report_says_what_is_padding() -> None:
    reports = data_of(experiment("w")).reports
    padded = [line for line in reports if "batches of inputs padded to" in line]
    assert len(padded) == 2
    assert "batches of inputs padded to 24, 40 or 64 tokens" in padded[0]
    assert padded[1].startswith("evaluation batches of inputs padded to")
    fixed = data_of(experiment("w", {"data.buckets": "none"}))
    assert any("batches of inputs padded to 64 tokens" in line for line in fixed.reports)
    cut = data_of(experiment("w", {"data.inputs_length": 20, "data.buckets": "auto"}))
    assert "cut to 20 tokens" in cut.reports[0]


def test_the_default_has_few_lengths_and_described_prompts_one() -> None:
    of = experiment("w")
    of = dataclasses.replace(of, data=dataclasses.replace(of.data, buckets="auto"))
    assert task_data.buckets_of(of) == Buckets(most=4, beside=5)
    assert Experiment().data.buckets == "auto"
    assert 1 < len(batches_of(of).inputs_lengths) <= 4
    described = dataclasses.replace(of, method=DescribedPrompts())
    assert task_data.buckets_of(described) == Buckets()
