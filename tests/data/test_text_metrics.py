"""Metrics of text: values recorded from t5's functions with sacrebleu 2.6.0 and editdistance."""

import math

import pytest

from prompt_tuning_jax.data.tasks.metrics import get_metric, score
from prompt_tuning_jax.data.tasks.text_metrics import auc, bleu, international_words, span_squad
from prompt_tuning_jax.errors import UserError

TARGETS = ["the cat sat on the mat , 1.5 m away .", "Hello there, General Kenobi!"]
PREDICTIONS = ["the cat sat on a mat, 1.5 m.", "Hello there General Kenobi"]


def test_bleu_as_recorded():
    assert bleu(TARGETS, PREDICTIONS) == pytest.approx(40.25945682286015, abs=1e-9)
    assert bleu(["a b c d e"], ["a b c x d e"]) == pytest.approx(37.99178428257963, abs=1e-9)
    # White space at the end is no character behind the last sign.
    assert bleu(["a b c d e  "], ["a b c d, e%  "]) == pytest.approx(43.47208719449914, abs=1e-9)
    assert bleu([["x y z w v"]], ["x y z w u"]) == pytest.approx(66.87403049764218, abs=1e-9)


def test_bleu_of_several_references_and_of_nothing():
    one, other = "the cat sat there today", "a dog ran far away"
    assert bleu([[one, other]], [other]) == pytest.approx(100)
    assert bleu([[one, other]], [one]) == pytest.approx(100)
    assert bleu(["", "a b c d"], ["", ""]) == 0
    assert bleu([one], ["quite something else"]) == 0
    with pytest.raises(UserError, match="same number of references"):
        bleu([[one], [one, other]], [one, other])


def test_international_words():
    assert international_words("It's 1.5 m, $5 (A.) 3,000!") == (
        ["It", "'", "s", "1.5", "m", ",", "$", "5", "(", "A", ".", ")", "3,000!"]
    )


def test_question_answering_as_recorded():
    answers = [["The Eiffel-Tower", "Eiffel Tower"], ["1,000 m"]]
    found = score([get_metric("trivia_qa")], answers, ["eiffel tower!", "1000 m"])
    assert found == pytest.approx({"em": 50.0, "f1": 70.0})
    answers = [["The Eiffel-Tower", "Eiffel Tower"], ["!"], ["a dog"]]
    given = ["eiffel tower!", "the", "the big dog"]
    coqa = get_metric("coqa_f1").fn(answers, given)
    assert coqa == pytest.approx(88.88888888888889)
    span = {"answers": ["big dog"], "context": "A big, dog ran."}
    spans = ["start: 1 end: 2", "start: x end: 2", "start: 0 end: 1"]
    assert span_squad([span] * 3, spans) == pytest.approx(
        {"em": 33.33333333333333, "f1": 55.55555555555555}
    )
    assert span_squad([span], ["3"]) == {"em": 0.0, "f1": 0.0}


def test_edit_distance_as_recorded():
    metric = get_metric("edit_distance")
    assert metric.fn(TARGETS, PREDICTIONS) == {
        "min_edit": 2, "max_edit": 4, "mean_edit": 3, "median_edit": 3, "sum_edit": 6,
    }  # fmt: skip
    assert metric.declared_direction("mean_edit") == "min"
    assert get_metric("trivia_qa").declared_direction("em") == "max"


def test_areas_under_curves_as_recorded():
    found = auc([0, 0, 1, 1, 1], [0.1, 0.4, 0.35, 0.8, 0.2])
    assert found == pytest.approx({"auc-roc": 0.6666666666666666, "auc-pr": 0.8055555555555556})
    assert all(math.isnan(area) for area in auc([1, 1], [0.1, 0.4]).values())


@pytest.mark.parametrize("name", ["bleu", "edit_distance", "coqa_f1", "trivia_qa"])
def test_metrics_of_text_refuse_other_values(name):
    with pytest.raises(UserError, match=f"'{name}' compares texts"):
        score([get_metric(name)], [1], [2])
