"""Properties of the metrics and of what they compare."""

import json
import math
import random
import sys
from dataclasses import replace

import numpy as np
import pytest

from prompt_tuning_jax.config.experiment import Data
from prompt_tuning_jax.data.tasks.labels import example_weights
from prompt_tuning_jax.data.tasks.metric_functions import normalized, squad
from prompt_tuning_jax.data.tasks.metrics import score
from prompt_tuning_jax.data.tasks.selection import build_mixture, mixture_of
from prompt_tuning_jax.data.tasks.t5_tasks import metrics, postprocess
from prompt_tuning_jax.data.tasks.t5_tasks.leaderboard import submission
from prompt_tuning_jax.data.tasks.t5_tasks.metrics import (
    SUPER_GLUE_METRICS,
    super_glue_score,
    super_glue_task_score,
)
from prompt_tuning_jax.data.tasks.t5_tasks.tables import T5_TASKS
from prompt_tuning_jax.errors import UserError

SUMMARIES = ("The cat sat . It ran away .", "A dog barked .", "Rain fell all day . Then snow .")


def one(metric, targets, predictions):
    (value,) = score([metric], targets, predictions).values()
    return value


def test_an_invalid_prediction_is_wrong_and_never_dropped():
    targets = [0, 1, 1, 0]
    for metric in (metrics.ACCURACY, metrics.F1_WITH_INVALID, metrics.mean_multiclass_f1(2)):
        assert one(metric, targets, targets) == 100
        assert one(metric, targets, [-1] * 4) == 0
        assert one(metric, targets, [0, 1, 1, -1]) < 100
    assert one(metrics.F1_WITH_INVALID, targets, [0, 1, 1, 7]) == one(
        metrics.F1_WITH_INVALID, targets, [0, 1, 1, 1]
    )


def test_perfect_and_reversed_predictions_correlate_fully():
    targets = [0.0, 1.5, 2.5, 5.0]
    for metric in (metrics.PEARSON, metrics.SPEARMAN):
        assert one(metric, targets, targets) == pytest.approx(100, abs=1e-12)
        assert one(metric, targets, [5 - t for t in targets]) == pytest.approx(-100, abs=1e-12)
    assert one(metrics.SPEARMAN, targets, [t**3 for t in targets]) == pytest.approx(100, abs=1e-12)
    assert one(metrics.MATTHEWS, [0, 1, 1], [0, 1, 1]) == 100
    assert one(metrics.MATTHEWS, [0, 1, 1], [1, 0, 0]) == -100


@pytest.mark.filterwarnings("error")
def test_constant_predictions_give_no_correlation_and_no_warning():
    for metric in (metrics.PEARSON, metrics.SPEARMAN):
        assert math.isnan(one(metric, [0.0, 1.0], [-1.0, -1.0]))
        assert math.isnan(one(metric, [1.0], [1.0]))
    assert one(metrics.MATTHEWS, [0, 1], [-1, -1]) == 0
    assert one(metrics.F1_WITH_INVALID, [0, 0], [0, 0]) == 0
    assert one(metrics.mean_multiclass_f1(3), [0, 0], [-1, -1]) == 0


def test_a_number_that_is_none_reads_as_minus_one():
    assert [postprocess.number(t, {}, False) for t in ("3.4", " 2", "x", "", "nan", "inf")] == [
        3.4,
        2.0,
        -1.0,
        -1.0,
        -1.0,
        -1.0,
    ]


def test_the_questions_of_multirc_need_not_be_together():
    targets = [{"group": g, "value": v} for g, v in ((0, 1), (1, 0), (0, 0), (2, 1), (1, 1))]
    right = [{"value": t["value"]} for t in targets]
    assert one(metrics.MULTIRC_EXACT_MATCH, targets, right) == 100
    wrong = [{"value": -1}, *right[1:]]
    assert one(metrics.MULTIRC_EXACT_MATCH, targets, wrong) == pytest.approx(200 / 3, abs=1e-12)
    # Of a question id that repeats, the answers are scored as one question's, as in the original.
    twice = [*targets, *targets]
    assert one(metrics.MULTIRC_EXACT_MATCH, twice, [*right, *wrong]) == pytest.approx(200 / 3)


def test_record_counts_each_gap_once_by_its_first_prediction():
    task = T5_TASKS["super_glue_record_v102"]

    def example(passage, query, *answers):
        return {"idx/passage": passage, "idx/query": query, "answers": list(answers)}

    examples = [example(0, 0, "Ann", "Ann B."), example(0, 0, "Ann", "Ann B."), example(1, 0, "Bo")]
    texts = ["ann b", "wrong", "bo"]
    targets = [task.postprocess("", e, True) for e in examples]
    predictions = [task.postprocess(t, e, False) for t, e in zip(texts, examples, strict=True)]
    assert score(task.metrics, targets, predictions) == {"em": 100, "f1": 100}
    assert score(task.metrics, targets[1:], predictions[1:]) == {"em": 50, "f1": 50}


def test_more_right_answers_never_lower_the_score():
    draw = random.Random(0)
    words = ["the", "cat", "Sat.", "on", "a", "mat"]
    for _ in range(200):
        answers = [" ".join(draw.choices(words, k=draw.randint(1, 4))) for _ in range(3)]
        prediction = " ".join(draw.choices(words, k=draw.randint(0, 4)))
        few, many = squad([answers[:1]], [prediction]), squad([answers], [prediction])
        assert all(many[key] >= few[key] for key in few)


def test_normalising_twice_changes_nothing_more():
    for text in ("The  Cat's!", "anthea", "É a b", "日本、語", "a\r\nthe b"):
        assert normalized(normalized(text)) == normalized(text)


def test_an_article_leaves_a_blank():
    """ASCII punctuation leaves nothing, other punctuation stays."""
    assert normalized("x\u2014the\u2014y") == "x\u2014 \u2014y"
    assert normalized("x-the-y, a. z") == "xthey z"


@pytest.mark.parametrize("name", ["squad_v010_allanswers", "mrqa_race_v100"])
def test_any_answer_of_a_question_is_right(name):
    task = T5_TASKS[name]
    example = {"targets": "Ann", "answers": ["Ann", "Miss B ."]}
    target = task.postprocess("Ann", example, True)
    for text in ("ann", "miss b", "Miss B."):
        found = score(task.metrics, [target], [task.postprocess(text, example, False)])
        assert found == {"em": 100, "f1": 100}


def test_a_referent_is_the_same_without_case_and_determiners():
    example = {"targets": "The Dog", "label": 1}
    for text in ("dog", "that DOG", "big dog", "his dog"):
        assert postprocess.wsc_referent(text, example, False) == 1
    for text in ("dogs", "dog's", "cat"):
        assert postprocess.wsc_referent(text, example, False) == 0
    for text in ("", " ", "the", "those"):
        assert postprocess.wsc_referent(text, example, False) == -1
    assert postprocess.wsc_referent("anything", {**example, "label": 0}, True) == 0


def test_rouge_of_the_same_and_of_other_texts():
    assert set(score([metrics.ROUGE], SUMMARIES, SUMMARIES).values()) == {100.0}
    other = score([metrics.ROUGE], SUMMARIES, ["xyz"] * 3)
    assert other == {"rouge1": 0, "rouge2": 0, "rougeLsum": 0}


def test_rouge_is_what_the_originals_draws_scatter_around():
    from rouge_score import rouge_scorer, scoring

    draw = random.Random(1)
    words = ["the", "cat", "sat", "on", "a", "mat", ".", "it", "ran"]
    texts = [[" ".join(draw.choices(words, k=12)) for _ in range(40)] for _ in range(2)]
    found = score([metrics.ROUGE], *texts)
    keys = ["rouge1", "rouge2", "rougeLsum"]
    scorer, aggregator = rouge_scorer.RougeScorer(keys), scoring.BootstrapAggregator()
    for target, prediction in zip(*texts, strict=True):
        aggregator.add_scores(
            scorer.score(target.replace(" . ", " .\n"), prediction.replace(" . ", " .\n"))
        )
    state = np.random.get_state()
    np.random.seed(0)
    result = aggregator.aggregate()
    np.random.set_state(state)
    assert found == {key: pytest.approx(100 * result[key].mid.fmeasure, abs=0.3) for key in keys}


def test_sentences_count_in_rouge_lsum():
    """The same sentences in another order: the longest common subsequence of each is whole."""
    found = score([metrics.ROUGE], ["a b c . d e f"], ["d e f . a b c"])
    assert found["rougeLsum"] == 100
    assert found["rouge2"] < 100


def test_the_super_glue_score_is_the_mean_of_task_means():
    scores = {
        task: {name: 10.0 * (i + 1) for name in names}
        for i, (task, names) in enumerate(SUPER_GLUE_METRICS.items())
    }
    assert super_glue_score(scores) == 45
    scores["cb"] = {"mean_3class_f1": 0.0, "accuracy": 40.0}
    assert super_glue_task_score("cb", scores["cb"]) == 20
    assert super_glue_score({**scores, "axb": {"matthews_corrcoef": 99.0}}) == 45
    with pytest.raises(UserError, match="missing: copa, wsc"):
        super_glue_score({t: s for t, s in scores.items() if t not in ("copa", "wsc")})
    with pytest.raises(UserError, match="'multirc' needs exact_match"):
        super_glue_task_score("multirc", {"f1": 1.0})
    with pytest.raises(UserError, match="'axb' does not count"):
        super_glue_task_score("axb", {})


def test_the_score_uses_metrics_that_the_tasks_have():
    for short, names in SUPER_GLUE_METRICS.items():
        task = next(
            t
            for t in T5_TASKS.values()
            if (t.benchmark, t.short) == ("super_glue", short) and t.metrics
        )
        offered = {metric.name for metric in task.metrics}
        assert set(names) <= offered | ({"em"} if short == "record" else set())


def test_the_first_metric_has_the_name_of_a_number():
    """The best checkpoint is chosen by it."""
    values = {"squad": [["a"]], "mrqa": [["a"]], "summarization": ["a"]}
    for task in T5_TASKS.values():
        if task.benchmark in values:
            assert task.metrics[0].name in score(task.metrics, values[task.benchmark], ["a"])


def test_the_metrics_module_imports_no_library_until_used():
    import subprocess

    code = (
        "import sys, prompt_tuning_jax.data.tasks.t5_tasks.tables;"
        "print(*(sys.modules.keys() & {'sklearn', 'scipy', 'rouge_score', 'jax', 'tensorflow'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout.strip()


ANSWERS = {"answers": ["the River", "Rome"]}
IDS = {"idx/question": 3, "idx/passage": 1, "idx/query": 2}


@pytest.mark.parametrize("prefix", ["", "answer: "])
@pytest.mark.parametrize(
    ("name", "example", "right", "wrong"),
    [
        ("super_glue_rte_v102", {"targets": "entailment"}, ["entailment"], ["not_entailment", "x"]),
        ("super_glue_multirc_v102", {"targets": "True", **IDS}, ["True"], ["False", "x"]),
        (
            "super_glue_record_v102",
            {"targets": "Rome", **ANSWERS, **IDS},
            ["rome.", "river"],
            ["x", ""],
        ),
        ("squad_v010_allanswers", {"targets": "the River", **ANSWERS}, ["Rome", "River"], ["x"]),
        ("pr:super_glue_record_v102_rc", {"targets": "Rome", **ANSWERS}, ["the River"], ["x"]),
        (
            "super_glue_wsc_v102_simple_eval",
            {"targets": "the dog", "label": 1},
            ["dog"],
            ["the cat", "the"],
        ),
        ("glue_stsb_v002", {"targets": "3.4"}, ["3.4", "3.40"], ["3.2", "x"]),
    ],
)
def test_a_prediction_is_correct_where_the_metrics_count_it(name, example, right, wrong, prefix):
    (task,) = build_mixture(Data(task=name, targets_prefix=prefix)).tasks
    example = {**example, "targets": prefix + example["targets"]}
    for texts, expected in ((right, True), (wrong, False)):
        for text in texts:
            assert task.is_correct(example, prefix + text) is expected, text


@pytest.mark.parametrize("prefix", ["", "answer: "])
@pytest.mark.parametrize("name", ["boolq", "cb", "copa", "multirc", "rte", "wic"])
def test_metrics_that_a_user_names_compare_labels(name, prefix):
    named = ("accuracy", "exact_match", "f1_macro")
    data = Data(task=f"super_glue_{name}_v102", metrics=named, targets_prefix=prefix)
    (task,) = build_mixture(data).tasks
    examples = [{"targets": label} for label in task.labels]
    right = task.score(examples, list(task.labels))
    assert right == {**dict.fromkeys(named, 100.0), "invalid": 0.0}
    wrong = task.score(examples, [*task.labels[1:], task.labels[0]])
    assert wrong == {**dict.fromkeys(named, 0.0), "invalid": 0.0}


def test_labels_have_their_prefix_wherever_they_go():
    data = Data(task="super_glue_v102_examples_proportional", targets_prefix="<extra_id_0> ")
    known = {one.name: one.labels for one in mixture_of(data)}
    assert known == {task.name: task.labels for task in build_mixture(data).tasks}
    (task,) = build_mixture(replace(data, task="super_glue_rte_v102")).tasks
    (line,) = submission(task, [{"idx": 3}], ["<extra_id_0> entailment"]).lines
    assert json.loads(line) == {"idx": 3, "label": "entailment"}
    (task,) = build_mixture(replace(data, task="super_glue_record_v102")).tasks
    gap = {"idx/query": 4, "idx/passage": 1, "targets": "<extra_id_0> Paris", "answers": ["Paris"]}
    (line,) = submission(task, [gap], ["<extra_id_0> Paris"]).lines
    assert json.loads(line) == {"idx": 4, "label": "Paris"}
    targets = ["answer: yes", "answer: no", "answer: no"]
    for entry in ("yes=2", "answer: yes=2"):
        weights = example_weights(
            [entry], [(("answer: yes", "answer: no"), targets)], prefix="answer: "
        )
        assert weights.tolist() == [2, 1, 1]
