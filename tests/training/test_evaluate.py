"""Predictions of several members against scoring and writing one by one."""

import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.data.batching.buckets import Buckets
from prompt_tuning_jax.data.batching.example_cache import make_ragged
from prompt_tuning_jax.data.batching.loader import eval_plan
from prompt_tuning_jax.data.batching.tokenize import TokenizedExamples
from prompt_tuning_jax.data.tasks.metrics import get_metric
from prompt_tuning_jax.data.tasks.task import Source, Task
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.api import generate, score, token_ids
from prompt_tuning_jax.inference.predictor import Predictions, Predictor, score_members
from prompt_tuning_jax.methods import PROMPT, NoTuning, PromptTuning, attach_method
from prompt_tuning_jax.methods.prompt import with_prompt
from tests.micro import EOS, ONE_LAYER, D, Words, make_t5, normal

WORDS = Words()
LABELS = ("aa", "b cd e", "yz", "q r")
PROMPTS_EPD = normal(3, 2, D, seed=3, scale=2)
TEXTS = ["one", "two words", "now three words", "f", "g h", "i", "jj kk ll mm"]
ANSWERS = [LABELS[i % 4] for i in range(len(TEXTS))]


def make_examples(number=None):
    number = len(TEXTS) if number is None else number
    rows = [
        {"inputs": text, "targets": answer}
        for text, answer in zip(TEXTS[:number], ANSWERS[:number], strict=True)
    ]
    source = Source(splits=("dev",), rows=lambda *_: rows, fingerprint=lambda *_: "rows")
    task = Task(name="micro", source=source, labels=LABELS, metrics=(get_metric("accuracy"),))
    return TokenizedExamples(
        task=task,
        split="dev",
        inputs=make_ragged([[*WORDS.encode(row["inputs"]), EOS] for row in rows]),
        targets=make_ragged([[*WORDS.encode(row["targets"]), EOS] for row in rows]),
        inputs_length=6,
        targets_length=5,
        load_texts=lambda: rows,
    )


@pytest.fixture(scope="module")
def model():
    model = make_t5(ONE_LAYER)
    model.vocabulary = WORDS
    return model


def predict(model, strategy, prompts_EPD=PROMPTS_EPD, *, batch_size=4, number=None, **kwargs):
    attached = with_prompt(model, prompts_EPD[0], PromptTuning(length=2))
    graphdef, params = param_tree.split(attached)
    _, frozen = param_tree.partition(params, {name: name == PROMPT for name in params})
    predictor = Predictor(
        graphdef=graphdef,
        vocabulary=WORDS,
        strategy=strategy,
        batch_size=batch_size,
        max_length=5,
        num_beams=2,
        labels=LABELS,
        **kwargs,
    )
    return predictor.predict(
        {PROMPT: prompts_EPD}, frozen, make_examples(number), members=len(prompts_EPD)
    )


def test_rank_is_the_best_of_all_label_scores(model):
    predicted = predict(model, "rank")
    for e, prompt in enumerate(PROMPTS_EPD):
        table = np.stack([score(model, TEXTS, [label] * len(TEXTS), prompt) for label in LABELS])
        want = [LABELS[i] for i in table.argmax(axis=0)]
        assert predicted.texts_EN[e] == want
        for known, column in zip(predicted.log_probs_EN[e], table.T, strict=True):
            assert tuple(known) == LABELS
            np.testing.assert_allclose(list(known.values()), column, atol=1e-4)
    assert len({tuple(texts) for texts in predicted.texts_EN}) > 1


@pytest.mark.parametrize("strategy", ["greedy", "beam"])
def test_writing_is_generating_with_each_prompt(model, strategy):
    predicted = predict(model, strategy)
    beams = {"num_beams": 2} if strategy == "beam" else {}
    for e, prompt in enumerate(PROMPTS_EPD):
        written = generate(model, TEXTS, prompt, strategy, max_length=5, **beams)
        best_B = written.scores if strategy == "greedy" else written.scores[:, 0]
        for source, text, known, want, value, scores, ids_KS in zip(
            *(TEXTS, predicted.texts_EN[e], predicted.log_probs_EN[e], written.texts),
            *(best_B, written.scores, written.ids),
            strict=True,
        ):
            # Random weights make beams whose scores tie; rounding then chooses among them.
            second = float(np.min(scores))
            tie = strategy == "beam" and abs(second - float(value)) < 1e-3
            assert text == want or tie
            assert list(known) == [text]
            if strategy == "beam":  # whose score is divided by a penalty for the length
                (ends,) = np.nonzero(np.isin(ids_KS[0], model.token_ids.all_eos))
                tokens = ids_KS[0][: ends[0] + 1 if len(ends) else None].tolist()
                value = float(score(model, [source], [tokens], prompt)[0])
            assert known[text] == pytest.approx(float(value), abs=1e-3 if tie else 1e-4)


@pytest.mark.parametrize("strategy", ["rank", "greedy", "beam"])
def test_predictions_do_not_depend_on_the_batch_size(model, strategy):
    want = predict(model, strategy)
    for batch_size in (3, 100):  # 100: more than there are
        got = predict(model, strategy, batch_size=batch_size)
        assert got.texts_EN == want.texts_EN
        for ours, theirs in zip(got.log_probs_EN, want.log_probs_EN, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.parametrize("strategy", ["rank", "greedy", "beam"])
def test_predictions_in_buckets_are_those_without_in_the_same_order(model, strategy):
    buckets = Buckets(lengths=(2, 4))
    want, got = predict(model, strategy), predict(model, strategy, batch_size=2, buckets=buckets)
    assert strategy == "beam" or got.texts_EN == want.texts_EN
    for ours, theirs in zip(got.log_probs_EN, want.log_probs_EN, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            # Which of two beams that score the same is best depends on rounding.
            same = 1e-4 if [*a] == [*b] else 1e-6
            assert [*a.values()] == pytest.approx([*b.values()], abs=same)
    plan = eval_plan(make_examples(), batch_size=2, buckets=buckets)
    assert len({length for _, length in plan}) > 1
    assert np.concatenate([index_B for index_B, _ in plan]).tolist() != list(range(8))


def test_a_member_predicts_the_same_alone_and_groups_join(model):
    together = predict(model, "rank")
    parts = [predict(model, "rank", PROMPTS_EPD[e : e + 1]) for e in range(3)]
    joined = Predictions.joined(parts)
    assert joined.texts_EN == together.texts_EN
    assert [vote.prediction for vote in joined.votes()] == [
        vote.prediction for vote in together.votes()
    ]


def test_the_bare_model_is_one_member(model):
    graphdef, frozen = param_tree.split(attach_method(model, NoTuning(), key=None, context=None))
    predictor = Predictor(
        graphdef=graphdef,
        vocabulary=WORDS,
        strategy="rank",
        batch_size=4,
        max_length=5,
        labels=LABELS,
    )
    predicted = predictor.predict({}, frozen, make_examples(), members=1)
    table = np.stack([score(model, TEXTS, [label] * len(TEXTS)) for label in LABELS])
    assert predicted.texts_EN == [[LABELS[i] for i in table.argmax(axis=0)]]


def test_votes_and_scores_by_hand():
    examples = make_examples(4)  # answers: the four labels in order
    a, b, c, d = LABELS
    texts_EN = [[a, a, c, "w7"], [a, b, d, "w8"], [b, c, d, d]]
    likes = [{a: -1.0, b: -2.0, c: -3.0, d: -4.0}] * 3
    log_probs_EN = [[likes[e]] * 4 for e in range(3)]
    predictions = Predictions(texts_EN=texts_EN, log_probs_EN=log_probs_EN)
    votes = predictions.votes()
    # Two of three; all differ, so by the sums; two of three; all differ, and only d is known.
    assert [vote.prediction for vote in votes[:3]] == [a, a, d]
    assert votes[0].votes == {a: 2, b: 1}
    scores = score_members(examples, predictions)
    assert [s["accuracy"] for s in scores] == [50.0, 50.0, 25.0]
    assert [s["invalid"] for s in scores] == [25.0, 25.0, 0.0]


def test_ranking_needs_labels(model):
    graphdef, _ = param_tree.split(attach_method(model, NoTuning(), key=None, context=None))
    with pytest.raises(UserError, match="strategy=rank needs labels") as error:
        Predictor(graphdef=graphdef, vocabulary=WORDS, strategy="rank", batch_size=4, max_length=5)
    assert "\n" not in str(error.value)


def test_texts_are_tokenised_alike(model):
    examples = make_examples()
    np.testing.assert_array_equal(
        examples.inputs.padded(np.arange(len(TEXTS)), 5), token_ids(model, TEXTS)
    )
