"""Targets that nothing can equal, labels that look alike, and texts that a vocabulary rewrites."""

import dataclasses
import unicodedata
from collections import Counter

import numpy as np
import pytest

from prompt_tuning_jax.config.field_syntax import parse_class_weights
from prompt_tuning_jax.data.batching.task_data import TaskData
from prompt_tuning_jax.data.batching.tokenize import tokenize
from prompt_tuning_jax.data.tasks.files import file_task
from prompt_tuning_jax.data.tasks.labels import (
    example_weights,
    label_line,
    label_notes,
    listed_counts,
    near_label,
    require_labels_known,
)
from prompt_tuning_jax.data.tasks.metrics import get_metric
from prompt_tuning_jax.data.tasks.task import Source, Task
from prompt_tuning_jax.data.vocabularies.vocab import ByteVocabulary, Vocabulary
from prompt_tuning_jax.errors import UserError
from tests import tiny_run


def task_of(targets, *, labels=(), postprocess=None, metrics=("accuracy",)):
    rows = [{"inputs": f"text {i}", "targets": target} for i, target in enumerate(targets)]
    source = Source(
        splits=("train",), rows=lambda split, _: rows, fingerprint=lambda split, _: repr(rows)
    )
    return Task(
        name="t",
        source=source,
        labels=labels,
        postprocess=postprocess,
        metrics=tuple(get_metric(name, labels=labels) for name in metrics),
    )


def examples_of(task, vocabulary=None):
    vocabulary = vocabulary or Vocabulary(tiny_run.vocabulary_file())
    return tokenize(task, "train", vocabulary, inputs_length=16, targets_length=64, use_cache=False)


def test_the_majority_class_is_that_of_the_examples_own_task():
    data = TaskData(
        train=None,
        targets_by_task={"t": ("no", "no", "yes"), "other": ("yes",) * 9},
        evaluation={},
        labels=("no", "yes"),
        task_labels=(),
        best_by="accuracy",
        direction="max",
        reports=(),
    )
    one = examples_of(task_of(["no", "no", "no", "yes"], labels=("no", "yes")))
    assert dataclasses.replace(data, evaluation={"t": one}).baselines() == {"majority class": 75.0}
    elsewhere = dataclasses.replace(one, task=dataclasses.replace(one.task, name="untrained"))
    assert data.majority_scores(elsewhere)["accuracy"] == 25.0


def test_labels_are_listed_by_how_many_there_are():
    found = Counter({"shipping": 70, "billing": 73})
    assert label_line(found, ("billing", "other", "shipping")) == (
        "labels: billing 73, shipping 70, other 0"
    )
    assert listed_counts({str(i): 1 for i in range(25)}).endswith("and 5 more")


@pytest.mark.parametrize(
    ("labels", "alike"),
    [
        (("Shipping", "shipping"), True),
        (("not-entailed", "not_entailed", "b"), True),
        (("1", "1.0"), True),
        (("ｇｏｏｄ", "good"), True),
        (("caf\u00e9", "cafe\u0301"), True),
        (("good", "goods"), False),
        (("+", "-"), False),
        (("1", "10"), False),
    ],
)
def test_labels_that_look_alike_are_worth_a_note(labels, alike):
    notes = [*label_notes(Counter(labels), labels)]
    assert any("look like the same label" in note for note in notes) is alike


def test_one_class_and_quoted_labels_are_worth_a_note():
    assert any("one class" in note for note in label_notes({"a": 9}, ("a",)))
    assert any("one class" in note for note in label_notes({"a": 9}, ("a", "b")))
    assert not [*label_notes({"a": 9, "b": 1}, ("a", "b"))]
    assert any("quoted" in note for note in label_notes({'"a"': 9, '"b"': 1}, ('"a"', '"b"')))


@pytest.mark.parametrize(
    ("target", "labels", "near"),
    [
        ("0.0", ("0", "1"), "0"),
        ("1", ("0.0", "1.0"), "1.0"),
        ("Positive", ("negative", "positive"), "positive"),
        ("not entailment", ("entailment", "not_entailment"), "not_entailment"),
        ("shiping", ("billing", "shipping"), "shipping"),
        ("neutral", ("negative", "positive"), None),
    ],
)
def test_targets_that_no_prediction_equals_are_refused(target, labels, near):
    assert near_label(target, labels) == near
    task = task_of([labels[0], target, target], labels=labels)
    with pytest.raises(UserError, match="not one of the labels") as caught:
        require_labels_known(task, "dev.csv", [*task.load("train")], of_training=True)
    message = str(caught.value)
    assert message.startswith("dev.csv: ") and f"{target} 2" in message and "\n" not in message
    assert near is None or f"did you mean {near!r}" in message


def test_what_the_task_itself_takes_for_equal_is_no_fault():
    def number(text, example, is_target):
        try:
            return float(text)
        except ValueError:
            return -1.0

    task = task_of(["1.0", "0"], labels=("0", "1"), postprocess=number)
    require_labels_known(task, "t", [*task.load("train")], of_training=True)


REWRITTEN = [
    "be  du",
    "ｂｅ du",
    "be\ndu",
    "be\u00a0du",
    "be\tdu",
    unicodedata.normalize("NFD", "bé du").replace("\u0301", ""),
]


@pytest.mark.parametrize("target", REWRITTEN[:5])
@pytest.mark.parametrize("labeled", [False, True])
def test_what_the_vocabulary_makes_of_a_target_is_that_target(target, labeled):
    task = task_of(
        [target, "fu", target],
        labels=(target, "fu") if labeled else (),
        metrics=("accuracy", "f1_macro"),
    )
    examples = examples_of(task)
    assert examples.rewritten == {target: "be du"}
    for predictions in (["be du", "fu", "be du"], [target, "fu", target]):
        scores = examples.score(predictions)
        assert scores["accuracy"] == scores["f1_macro"] == 100
        assert scores.get("invalid", 0) == 0
    assert examples.score(["fu", "fu", "fu"])["accuracy"] == pytest.approx(100 / 3)
    assert any("reads back as 'be du'" in note for note in examples.rewritten_notes())


def test_letters_that_are_lost_are_said_and_never_right():
    examples = examples_of(task_of(["be Ω", "du 猫", "du"]))
    notes = [*examples.rewritten_notes()]
    assert any("2 targets cannot be represented" in note for note in notes)
    # Other letters would read back the same.
    written = examples.read_back(["be Ω", "du 猫", "du"])
    assert examples.score(written)["accuracy"] == pytest.approx(100 / 3)


def test_nothing_is_said_where_the_task_or_the_vocabulary_makes_no_difference():
    normalized = task_of(["be  du"], postprocess=lambda text, example, _: " ".join(text.split()))
    assert examples_of(normalized).rewritten == {}
    assert examples_of(task_of(["be  du", "ｇ\n猫"]), ByteVocabulary()).rewritten == {}


def test_class_weights():
    targets = ["a"] * 6 + ["b"] * 2
    weights = example_weights(["balanced"], [(("a", "b", "c"), targets)])
    np.testing.assert_allclose(weights, [8 / 12] * 6 + [2] * 2, rtol=1e-6)
    given = example_weights(["b=3"], [(("a", "b"), targets)])
    assert given.dtype == np.float32 and given.tolist() == [1.0] * 6 + [3.0] * 2
    assert parse_class_weights(["x=y=2"]) == {"x=y": 2.0}


@pytest.mark.parametrize("entries", [["a"], ["a=x"], ["a=-1"], ["a=nan"], ["balanced", "a=1"]])
def test_class_weights_that_make_no_sense(entries):
    with pytest.raises(UserError, match=r"data\.class_weights: '.*' is neither LABEL=WEIGHT"):
        parse_class_weights(entries)


@pytest.mark.parametrize(
    ("entries", "labels", "match"),
    [
        (["abb=2"], ("ab", "c"), "no label 'abb': did you mean 'ab'"),
        (["balanced"], (), "the targets are text"),
        (["c=0", "ab=0"], ("ab", "c"), "all examples have weight 0"),
    ],
)
def test_class_weights_that_do_not_fit(entries, labels, match):
    with pytest.raises(UserError, match=match):
        example_weights(entries, [(labels, ["ab", "c"])])


def test_class_weights_of_several_tasks():
    tasks = [(("a", "b"), ["a", "b", "b", "b"]), (("c",), ["c"]), ((), ["a", "text"])]
    assert example_weights(["a=2", "c=3"], tasks).tolist() == [2, 1, 1, 1, 3, 1, 1]
    balanced = [2, 2 / 3, 2 / 3, 2 / 3, 1, 1, 1]
    np.testing.assert_allclose(example_weights(["balanced"], tasks), balanced, rtol=1e-6)


def test_labels_never_come_from_an_evaluation_file(tmp_path):
    path = tiny_run.write_rows(tmp_path / "a.jsonl", [{"inputs": "a", "targets": "yes"}] * 9)
    assert file_task(eval=str(path)).labels == ()
