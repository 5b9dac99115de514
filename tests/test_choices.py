"""Tasks whose examples choose among their own texts: ranked, scored, and refused."""

from typing import Any

import numpy as np
import pytest

from prompt_tuning_jax.config.experiment import Data, Evaluation
from prompt_tuning_jax.data.batching.task_data import build_data
from prompt_tuning_jax.data.tasks.metrics import get_metric
from prompt_tuning_jax.data.tasks.registry import get_task, register
from prompt_tuning_jax.data.tasks.t5_tasks.recycling import (
    gap,
    one_of_answers,
    random_sentiment,
    rank_accuracy,
)
from prompt_tuning_jax.data.tasks.task import Source, Task
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.api import score
from prompt_tuning_jax.inference.loading import load_prompts
from prompt_tuning_jax.inference.predictor import evaluate_members
from prompt_tuning_jax.inference.setup import build_model
from prompt_tuning_jax.methods.prompt import with_prompt
from tests import tiny_run

ROWS = [
    {"inputs": "ban blue ben", "targets": "blue", "choices": ["blue", "red red red", "green"]},
    {"inputs": "kan", "targets": "red", "choices": ["green blue", "red", "red"]},
    {"inputs": "dan red dir", "targets": "red", "choices": ["red", "blue"]},
]
PROMPTS = [np.random.default_rng(seed).normal(size=(3, 16)).astype(np.float32) for seed in (0, 1)]


def registered(rows: list[dict[str, Any]], **fields: Any) -> str:
    source = Source(
        splits=("train", "validation"),
        rows=lambda split, data_dir: rows,
        fingerprint=lambda split, data_dir: str(rows),
    )
    accuracy = get_metric("accuracy")
    fields = {"choices_field": "choices"} | fields
    task = Task(name="own_choices", source=source, metrics=(accuracy,), version="1", **fields)
    register(task, replace=True)
    return task.name


def evaluated(rows: list[dict[str, Any]], best_by: str = "", **fields: Any) -> Any:
    experiment = tiny_run.experiment(
        "",
        {
            "data": Data(
                task=registered(rows, **fields), inputs_length=16, targets_length=4, cache=False
            ),
            "evaluation": Evaluation(batch_size=2, best_by=best_by),
        },
    )
    model = build_model(experiment)
    loaded = load_prompts(experiment, model, PROMPTS)
    data = build_data(experiment, model.vocabulary, training=False)
    assert data.require_direction() in ("min", "max")
    (group,) = loaded.groups
    return model, evaluate_members(experiment, group, group.trainable, data)


def test_each_example_ranks_its_own_texts() -> None:
    model, (scores, predictions) = evaluated(ROWS)
    for member, prompt in enumerate(PROMPTS):
        tuned = with_prompt(model, prompt)
        right = {"": 0, "normed_": 0}
        for row, example in enumerate(ROWS):
            choices = [*dict.fromkeys(example["choices"])]
            sums = score(tuned, [example["inputs"]] * len(choices), choices)
            means = score(tuned, [example["inputs"]] * len(choices), choices, normalize_length=True)
            known = predictions["own_choices"].log_probs_EN[member][row]
            np.testing.assert_allclose([known[text] for text in choices], sums, atol=1e-4)
            best = choices[int(np.argmax(sums))]
            assert predictions["own_choices"].texts_EN[member][row] == best
            right[""] += best == example["targets"]
            right["normed_"] += choices[int(np.argmax(means))] == example["targets"]
        for prefix, number in right.items():
            assert scores[member][f"{prefix}accuracy"] == pytest.approx(100 * number / 3)


@pytest.mark.parametrize(
    "fields", [{}, {"choices_field": "", "ranks": True, "labels": ("blue", "red")}]
)
def test_any_score_of_a_ranking_may_choose_checkpoints(fields: dict[str, Any]) -> None:
    _, (scores, _) = evaluated(ROWS, **fields)
    assert {"normed_accuracy", "auc-pr"} & scores[0].keys()
    for name in scores[0]:
        assert name in evaluated(ROWS, best_by=name, **fields)[1][0][0]
    with pytest.raises(UserError, match=r"evaluation\.best_by: no metric 'auc'"):
        evaluated(ROWS, best_by="auc", **fields)


def test_examples_without_choices() -> None:
    with pytest.raises(UserError, match="'choices' of each example must be a list of texts"):
        evaluated([*ROWS[:1], {"inputs": "a", "targets": "b"}])


def test_the_ranked_task_of_gaps() -> None:
    row = {
        "passage": "Rain fell on Lagos.",
        "query": "@placeholder is wet",
        "entities": ["Lagos", "Rain"],
        "answers": ["Lagos", "The city"],
        "idx": {"passage": 1, "query": 2},
    }
    (example,) = gap(row)
    assert example["entities"] == ["Lagos", "Rain"]
    assert example["targets"] == "Lagos"
    task = get_task("pr:super_glue_record_v102_rc")
    assert task.choices_field == "entities"
    right = one_of_answers("Lagos", example, True)
    assert right == ["Lagos", "The city"]
    assert rank_accuracy([right, ["x"]], ["The city", "y"]) == 50.0


def test_texts_with_random_labels() -> None:
    texts = [f"page number {number} of many pages" for number in range(200)]
    made = [example for text in texts for example in random_sentiment({"text": text})]
    assert made == [example for text in texts for example in random_sentiment({"text": text})]
    assert all(
        text.startswith(one["inputs"]) and one["inputs"]
        for text, one in zip(texts, made, strict=True)
    )
    positive = sum(one["targets"] == "positive" for one in made)
    assert 70 < positive < 130
    assert len({len(one["inputs"].split()) for one in made}) == 6
