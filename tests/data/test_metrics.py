import itertools
import json
import math

import pytest

from prompt_tuning_jax.data.tasks.metrics import (
    EVALUATION_LOSS,
    Metric,
    accuracy,
    best_of,
    direction_by_name,
    exact_match,
    get_metric,
    invalid_share,
    is_better,
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


def test_accuracy_is_not_for_several_targets():
    for several in (["a", "b"], {"answers": ["a"]}):
        with pytest.raises(UserError, match="one target per example"):
            accuracy([several], ["a"])


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
    from prompt_tuning_jax.data.tasks.registry import (
        get_task,
    )

    task = get_task("super_glue_cb_v102")
    examples = [
        {"inputs": "", "targets": label} for label in ("entailment", "entailment", "neutral")
    ]
    scores = task.majority_scores(examples, ["entailment", "neutral", "entailment"])
    assert scores["accuracy"] == pytest.approx(200 / 3)
    assert scores["mean_3class_f1"] == pytest.approx(80 / 3)


def test_metrics_of_several_numbers_keep_their_names():
    from prompt_tuning_jax.data.tasks.metrics import Metric

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


@pytest.mark.parametrize("direction", ["max", "min"])
def test_nan_is_never_the_best(direction):
    for order in itertools.permutations([math.nan, 3.0, 21.9, math.nan, math.inf, 7.0]):
        best = order[best_of(order, direction)]
        assert best == (21.9 if direction == "max" else 3.0), order
    assert best_of([math.nan, math.nan], direction) == 0
    assert not is_better(math.nan, math.nan, direction)
    assert not is_better(math.nan, -1e9, direction) and not is_better(math.nan, 1e9, direction)
    assert is_better(-1e9, math.nan, direction) and is_better(1e9, math.nan, direction)
    assert best_of([2.0, 5.0, 2.0, 5.0], direction) == (1 if direction == "max" else 0)


@pytest.mark.parametrize(
    ("names", "direction"),
    [
        (
            "loss eval_loss wer WER word_error_rate cer mean_edit edit_distance perplexity ppl mse "
            "RMSE invalid nll cross_entropy bits_per_byte mnli/loss levenshteinDistance errors",
            "min",
        ),
        (
            "accuracy acc f1 em exact_match rouge1 rougeL rougeLsum bleu pearson_corrcoef "
            "spearman_corrcoef matthews_corrcoef mean_3class_f1 auc-roc sequence_accuracy "
            "rte/accuracy precision recall top5_accuracy accuracies",
            "max",
        ),
        ("score my_metric reward length loss_accuracy f1_error value_of_it", None),
    ],
)
def test_what_is_better_by_usual_names(names, direction):
    for name in names.split():
        assert direction_by_name(name) == direction, name


def test_every_metric_of_ours_declares_what_is_better():
    for name in metric_names():
        metric = get_metric(name, labels=LABELS)
        several = metric.direction if isinstance(metric.direction, dict) else (name,)
        for number in several:
            expected = "min" if name in ("loss", "invalid", "edit_distance") else "max"
            assert metric.declared_direction(number) == expected, number


def test_a_metric_of_several_numbers_declares_each():
    metric = Metric(name="x", fn=lambda t, p: {"a": 1.0, "b": 2.0}, direction={"a": "min"})
    assert metric.declared_direction("a") == "min" and metric.declared_direction("b") is None
    one = Metric(name="x", fn=lambda t, p: 1.0, direction="min")
    assert one.declared_direction("x") == "min" and one.declared_direction("y") is None


def test_the_loss_is_left_to_whoever_has_the_model():
    assert get_metric("loss") is EVALUATION_LOSS
    assert score([EVALUATION_LOSS, get_metric("accuracy")], ["a"], ["a"]) == {"accuracy": 100}


def test_correlations_of_text():
    assert value("pearson", ["1", "2", "3"], ["2.0", "4.0", "6.0"]) == pytest.approx(100)
    assert value("spearman", ["1", "2", "3"], ["1", "4", "9"]) == pytest.approx(100)
    assert value("pearson", ["1", "2", "3"], ["1", "4", "9"]) == pytest.approx(98.97, abs=0.01)
    assert math.isnan(value("pearson", ["1", "2"], ["3", "3"]))
    # What is not a number is as wrong as can be: 1 for 5, and 5 for 1.
    for nonsense in ("", "five", "nan", "inf", "1e400"):
        got = value("pearson", ["1", "2", "5"], ["1", "2", nonsense])
        assert got == pytest.approx(value("pearson", ["1", "2", "5"], ["1", "2", "1"])), nonsense
    with pytest.raises(UserError, match=r"'pearson' compares numbers, and the target 'good'"):
        value("pearson", ["1", "good"], ["1", "2"])


def test_f1_of_words_and_rouge():
    # One word of two, of three that are there: precision 1/2, recall 1/3.
    assert value("f1", ["red green blue"], ["Red, yellow!"]) == pytest.approx(40)
    assert value("f1", ["The cat"], ["a cat"]) == 100
    assert value("f1", ["the", ""], ["a", "word"]) == 50  # nothing is left of both, and of one
    targets, predictions = ["the cat sat on the mat"], ["the cat lay on a mat"]
    assert value("rouge1", targets, predictions) == pytest.approx(100 * 4 / 6)
    assert value("rouge2", targets, predictions) == pytest.approx(100 * 1 / 5)
    assert value("rougeL", targets, predictions) == pytest.approx(100 * 4 / 6)
    every = score([get_metric("rouge")], targets, predictions)
    assert list(every) == ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    assert every["rouge2"] == value("rouge2", targets, predictions)
    for name in ("f1", "rouge", "rougeL"):
        with pytest.raises(UserError, match="compares texts"):
            value(name, [1, 2], [1, 2])


def test_two_scores_of_one_name_are_refused() -> None:
    """The one that is not first would choose checkpoints."""
    metrics = [get_metric("f1"), get_metric("trivia_qa")]
    with pytest.raises(UserError, match="'trivia_qa' gives a score called 'f1', and so does one"):
        score(metrics, ["a"], ["b"])
