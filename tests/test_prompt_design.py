"""Prompt design through the commands: draws side by side, refusals, and what the model reads."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prompt_tuning_jax.data.batching import task_data
from prompt_tuning_jax.data.tasks.selection import build_mixture
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.evaluation import evaluate
from prompt_tuning_jax.inference.prediction import predict
from prompt_tuning_jax.inference.setup import build_model, vocabulary_of
from prompt_tuning_jax.methods import NoTuning, PromptDesign
from prompt_tuning_jax.training.run import train
from tests.tiny_run import LABELS, experiment

DESIGN = PromptDesign(shots=3, demonstration="{inputs} the {targets}", query="{inputs} the")


def designed(changes: dict[str, Any] | None = None) -> Any:
    base = {"method": DESIGN, "data.inputs_length": 64, "training.seeds": (0, 1)}
    return experiment("", base | (changes or {}))


def test_each_seed_is_a_member_with_demonstrations_of_its_own() -> None:
    result = evaluate(designed(), prompts=[])
    assert result.names == ("demonstrations of seed 0", "demonstrations of seed 1")
    assert result.ensemble is not None and len(result.per_prompt) == 2
    assert sum(line.startswith("demonstrations of seed") for line in result.reports) == 2
    (predictions,) = result.predictions.values()
    first, second = (
        np.array([list(known.values()) for known in own]) for own in predictions.log_probs_EN
    )
    assert np.abs(first - second).max() > 1e-4
    # A draw is the same alone as beside another one.
    alone = evaluate(designed({"training.seeds": (1,)}), prompts=[])
    assert alone.per_prompt == [result.per_prompt[1]] and alone.ensemble is None


def test_it_is_the_bare_model_on_a_longer_text() -> None:
    (found,) = predict(designed({"training.seeds": (0,)}), prompts=[], inputs=["bana bine"])
    of = designed({"training.seeds": (0,)})
    source = build_mixture(of.data).tasks[0]
    words = vocabulary_of(build_model(of))
    (example, *_) = task_data.designed(of, source, words).load("validation")
    *shots, _ = example["inputs"].split("\n\n")
    assert len(shots) == 3 and {shot.split()[-1] for shot in shots} == set(LABELS)
    text = "\n\n".join([*shots, "bana bine the"])
    bare = designed({"method": NoTuning(), "training.seeds": (0,)})
    (plain,) = predict(bare, prompts=[], inputs=[text])
    assert found.log_probs is not None and plain.log_probs is not None
    for label in LABELS:
        assert found.log_probs[label] == pytest.approx(plain.log_probs[label], abs=1e-5)


def test_without_shots_it_is_one_member_and_asks_for_no_training_data() -> None:
    changes = {"method": PromptDesign(shots=0), "data.train": "", "data.labels": LABELS}
    result = evaluate(designed(changes), prompts=[])
    assert result.names == ("no demonstrations",)
    bare = evaluate(designed({**changes, "method": NoTuning()}), prompts=[])
    assert result.per_prompt == bare.per_prompt


def test_it_writes_where_asked_to() -> None:
    of = designed({"evaluation.strategy": "greedy"})
    found = predict(of, prompts=[], inputs=["bana"])
    assert found[0].votes is not None and sum(found[0].votes.values()) == 2


@pytest.mark.parametrize(
    ("changes", "prompts", "says"),
    [
        ({"data.train": "", "data.labels": LABELS}, [], "data.train"),
        ({}, ["some.npy"], "leave out --prompt"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    changes: dict[str, Any], prompts: list[str], says: str
) -> None:
    with pytest.raises(UserError, match=says) as error:
        evaluate(designed(changes), prompts=prompts)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("method", "name"), [(DESIGN, "prompt_design"), (NoTuning(), "none")])
def test_there_is_nothing_to_train(method: Any, name: str, tmp_path: Path) -> None:
    of = experiment(tmp_path, {"method": method})
    with pytest.raises(UserError, match=f"method={name} trains nothing"):
        train(of)
    assert not list(tmp_path.iterdir())
