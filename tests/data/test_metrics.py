import json

import pytest

from prompt_tuning_jax.data.metrics import (
    accuracy,
    exact_match,
    get_metric,
    invalid_share,
    majority_class,
    metric_names,
    score,
)
from prompt_tuning_jax.errors import UserError

LABELS = ("no", "yes")


def value(name, targets, predictions, labels=LABELS):
    return get_metric(name, labels=labels).fn(targets, predictions)


def test_an_invalid_prediction_is_wrong_in_every_metric():
    targets = ["yes", "no", "yes", "no"]
    for name in ("accuracy", "exact_match", "f1_macro", "f1_binary"):
        assert value(name, targets, targets) == pytest.approx(100)
        assert value(name, targets, ["maybe"] * 4) == 0, name
        worse = value(name, targets, ["yes", "no", "yes", "maybe"])
        assert worse < 100, name


def test_accuracy_is_exact_and_exact_match_strips():
    assert accuracy(["yes"], ["yes "]) == 0
    assert exact_match(["yes"], [" yes\n"]) == 100
    assert exact_match(["yes"], ["Yes"]) == 0


def test_f1_macro_by_hand():
    # no: 1 of 2 found, 1 of 1 right -> 2/3;  yes: 1 of 1 found, 1 of 1 right -> 1.
    assert value("f1_macro", ["no", "no", "yes"], ["no", "x", "yes"]) == pytest.approx(500 / 6)
    # The same with a wrong label: yes is then right once in two -> 2/3.
    assert value("f1_macro", ["no", "no", "yes"], ["no", "yes", "yes"]) == pytest.approx(200 / 3)


def test_recorded_values_of_t5(shared):
    cases = json.loads((shared / "fixtures/tasks/cases.json").read_text())["metric_cases"]

    def text(numbers):
        return [str(number) for number in numbers]

    for case in cases["f1_score_with_invalid"]:
        got = value("f1_binary", text(case["t"]), text(case["p"]), ("0", "1"))
        assert got == pytest.approx(case["out"]["f1"])
    for case in cases["mean_3class_f1"]:
        got = value("f1_macro", text(case["t"]), text(case["p"]), ("0", "1", "2"))
        assert got == pytest.approx(case["out"]["mean_3class_f1"])
    for case in cases["accuracy"]:
        assert value("accuracy", case["t"], case["p"]) == pytest.approx(case["out"]["accuracy"])


def test_invalid_share_counts_what_is_no_label():
    assert invalid_share(LABELS, ["yes", "no", "Yes", ""]) == 50
    assert value("invalid", ["yes"] * 4, ["yes", "no", "Yes", ""]) == 50


def test_majority_baseline_learns_from_the_training_targets():
    assert majority_class(["b", "a", "b"]) == "b"
    assert majority_class(["b", "a"]) == "a"


def test_a_majority_is_scored_after_postprocessing():
    """Metrics of T5's tasks are over class ids, not over label strings."""
    from prompt_tuning_jax.data.task import get_task

    task = get_task("super_glue_cb_v102")
    examples = [
        {"inputs": "", "targets": label} for label in ("entailment", "entailment", "neutral")
    ]
    scores = task.majority_scores(examples, ["entailment", "neutral", "entailment"])
    assert scores["accuracy"] == pytest.approx(200 / 3)
    assert scores["mean_3class_f1"] == pytest.approx(80 / 3)


def test_metrics_of_several_numbers_keep_their_names():
    from prompt_tuning_jax.data.metrics import Metric

    both = Metric(name="unused", fn=lambda t, p: {"em": 1, "f1": 2.5})
    assert score([both, get_metric("accuracy")], ["a"], ["a"]) == {
        "em": 1.0,
        "f1": 2.5,
        "accuracy": 100.0,
    }


def test_scores_need_as_many_predictions_as_targets():
    for targets, predictions in ((["a"], []), ([], [])):
        with pytest.raises(ValueError, match="predictions"):
            score([get_metric("accuracy")], targets, predictions)


def test_wrong_names_and_label_sets_are_named():
    with pytest.raises(UserError, match="did you mean 'accuracy'"):
        get_metric("acuracy")
    with pytest.raises(UserError, match="exactly two labels"):
        get_metric("f1_binary", labels=("a", "b", "c"))
    with pytest.raises(UserError, match=r"data\.labels"):
        get_metric("invalid")
    for name in metric_names():
        assert get_metric(name, labels=LABELS).name == name
