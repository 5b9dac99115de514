"""Tasks that rank their labels whatever the experiment says, as the original's ``_rc`` tasks."""

from types import SimpleNamespace
from typing import Any

import pytest

from prompt_tuning_jax.config.experiment import Evaluation, Experiment
from prompt_tuning_jax.data.tasks.registry import get_task
from prompt_tuning_jax.inference.predictor import Predictions, _for_task, _label_curves


def test_a_ranked_task_has_its_own_strategy() -> None:
    experiment = Experiment(evaluation=Evaluation(strategy="beam", num_beams=2))
    name = "pr:glue_qqp_v200_0_1_verbalizers"
    assert _for_task(experiment, get_task(f"{name}_test")) is experiment
    for suffix, normalized in (("rc", False), ("rc_normed", True)):
        evaluation = _for_task(experiment, get_task(f"{name}_{suffix}")).evaluation
        assert (evaluation.strategy, evaluation.normalize_length) == ("rank", normalized)


def test_areas_under_the_curves_of_the_second_label() -> None:
    task = get_task("pr:imdb_v100_0_1_verbalizers_test_rc")
    targets = ["0", "0", "1", "1", "1"]
    odds = [0.1, 0.4, 0.35, 0.8, 0.2]  # as in the recorded values of t5
    # Only the difference of the two labels counts.
    known = [[{"0": -i, "1": sign * odd - i} for i, odd in enumerate(odds)] for sign in (1.0, -1.0)]
    examples: Any = SimpleNamespace(task=task, texts=[{"targets": t} for t in targets])
    first, second = _label_curves(examples, Predictions(texts_EN=[[], []], log_probs_EN=known))
    assert first == pytest.approx({"auc-roc": 66.66666666666666, "auc-pr": 80.55555555555556})
    assert second["auc-roc"] == pytest.approx(100 - 66.66666666666666)
