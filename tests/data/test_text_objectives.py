from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from prompt_tuning_jax.data.vocabularies.vocab import ByteVocabulary, Vocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.pretraining.denoising import TextInfilling, TokenDeletion
from prompt_tuning_jax.pretraining.text_corpus import Corpus
from prompt_tuning_jax.pretraining.text_objectives import (
    Mixture,
    Objective,
    PrefixLM,
    SpanCorruption,
)

TINY = Path(__file__).parents[2] / "prompt_tuning_jax/assets/tiny/spiece.model"
FIRST_ID = 3  # the token at position i of the corpus is i + FIRST_ID, so that it tells where it was
SPANS = SpanCorruption(inputs_length=64, targets_length=20)
PREFIX = PrefixLM(inputs_length=64, targets_length=20, min_prefix=4)
SHORT = PrefixLM(inputs_length=64, targets_length=20, min_continuation=1)
INFILLING = TextInfilling(inputs_length=64, targets_length=50)
DELETION = TokenDeletion(inputs_length=40, targets_length=64)
MIXED = Mixture(objectives=(SPANS, PREFIX, SHORT), weights=(5, 3, 0))
ALL = pytest.mark.parametrize(
    "objective", [SPANS, PREFIX, SHORT, MIXED, INFILLING, DELETION], ids=lambda o: type(o).__name__
)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(TINY)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus(
        tokens=np.arange(FIRST_ID, 5800, dtype=np.uint16), document_starts=np.zeros(1, np.int64)
    )


def examples(objective: Objective, corpus, vocabulary, *, count: int, seed: int = 0):
    for index in range(count):
        example = objective.example(corpus, vocabulary, index=index, seed=seed)
        yield example["inputs"].tolist(), example["targets"].tolist()


def restore(inputs: list[int], targets: list[int], vocabulary: Vocabulary) -> list[int]:
    """The text, by putting each sentinel's span back; checks the form on the way."""
    assert inputs.pop() == targets.pop() == 1
    sentinels = [vocabulary.sentinel(i) for i in range(100)]
    spans: list[list[int]] = []
    for token in targets:
        if token in sentinels:
            assert token == sentinels[len(spans)], "out of order"
            spans.append([])
        else:
            spans[-1].append(token)
    assert all(spans), "an empty span"
    text, used = [], 0
    previous_was_sentinel = True  # at the start there is text, too
    for token in inputs:
        if token in sentinels:
            assert token == sentinels[used], "out of order"
            assert not previous_was_sentinel, "two spans without text between them"
            text += spans[used]
            used += 1
        else:
            text.append(token)
        previous_was_sentinel = token in sentinels
    assert used == len(spans)
    return text


@pytest.mark.parametrize(
    "kwargs",
    [
        {"inputs_length": 128, "targets_length": 29},
        {"inputs_length": 64, "targets_length": 80, "noise_density": 0.5},
        {"inputs_length": 50, "targets_length": 50, "mean_span_length": 1.0},
        {
            "inputs_length": 40,
            "targets_length": 200,
            "noise_density": 0.75,
            "mean_span_length": 8.0,
        },
        {"inputs_length": 3, "targets_length": 3},
    ],
)
def test_spans_put_back_give_the_text(kwargs, corpus, vocabulary):
    objective = SpanCorruption(**kwargs)
    for inputs, targets in examples(objective, corpus, vocabulary, count=100):
        assert len(inputs) == objective.inputs_length
        assert len(targets) == objective.needed_targets_length
        text = restore(inputs, targets, vocabulary)
        assert len(text) == objective.window_length
        assert text == list(range(text[0], text[0] + len(text))), "not consecutive in the corpus"


def test_lengths_are_t5s():
    # What random_spans_helper gives, e.g. "568 tokens -> 512 inputs, 114 targets" in T5's own runs.
    lengths = {
        (o.window_length, o.needed_targets_length)
        for o in [
            SpanCorruption(inputs_length=512, targets_length=114),
            SpanCorruption(inputs_length=512, targets_length=512),
        ]
    }
    assert lengths == {(568, 114)}
    half = SpanCorruption(inputs_length=512, targets_length=512, noise_density=0.5)
    assert half.needed_targets_length <= 512


@pytest.mark.parametrize("length", [8, 33, 128, 511])
def test_no_longer_window_would_fit(length):
    objective = SpanCorruption(inputs_length=length, targets_length=length)
    window = objective.window_length
    noise = round(0.15 * (window + 1))
    spans = max(round(noise / 3), 1)
    assert window + 1 - noise + spans + 1 > length


def test_noise_density_and_span_lengths(corpus, vocabulary):
    noise_at = np.zeros(SPANS.window_length)
    lengths = []
    count = 2000
    for inputs, targets in examples(SPANS, corpus, vocabulary, count=count):
        hidden = {token for token in targets if 1 < token < vocabulary.sentinel(99)}
        lengths += [b - a - 1 for a, b in pairwise(np.flatnonzero(np.array(targets) > 5899))]
        first = inputs[0]
        noise_at += [first + i in hidden for i in range(SPANS.window_length)]
    density = noise_at.sum() / (count * SPANS.window_length)
    assert abs(density - 0.15) < 0.01
    # 70 tokens, 10 of them noise in 3 spans: a division of 10 into 3 has a mean of 10 / 3.
    assert abs(np.mean(lengths) - 10 / 3) < 0.15
    assert min(lengths) == 1
    assert max(lengths) == 8
    # Text comes first and noise last, always; in between no position is left out.
    assert noise_at[0] == 0
    assert noise_at[-1] == count
    assert noise_at[1:].min() > 0


def test_all_divisions_are_equally_likely(corpus, vocabulary):
    # Nine tokens of noise in two spans: the first has 1 to 8 of them, all as often.
    objective = SpanCorruption(inputs_length=51, targets_length=12, mean_span_length=4.0)
    lengths, starts = [], []
    for inputs, targets in examples(objective, corpus, vocabulary, count=8000):
        assert len(targets) == 12
        lengths.append(targets.index(vocabulary.sentinel(1)) - 1)
        starts.append(inputs.index(vocabulary.sentinel(0)))
    values, counts = np.unique(lengths, return_counts=True)
    assert values.tolist() == list(range(1, 9))
    assert np.abs(counts / 1000 - 1).max() < 0.15
    assert abs(np.corrcoef(lengths, starts)[0, 1]) < 0.04, "where and how long are one draw"


def test_windows_are_uniform_over_the_corpus(vocabulary):
    tokens = np.arange(FIRST_ID, FIRST_ID + 79, dtype=np.uint16)
    corpus = Corpus(tokens=tokens, document_starts=np.zeros(1, np.int64))
    assert SPANS.window_length == 70
    starts = [inputs[0] for inputs, _ in examples(SPANS, corpus, vocabulary, count=5000)]
    values, counts = np.unique(starts, return_counts=True)
    assert values.tolist() == list(range(FIRST_ID, FIRST_ID + 10))  # both ends included
    assert np.abs(counts / 500 - 1).max() < 0.2


def test_prefix_goes_on_in_the_targets(corpus, vocabulary):
    prefixes = []
    for inputs, targets in examples(PREFIX, corpus, vocabulary, count=3000):
        assert inputs.pop() == targets.pop() == 1
        text = inputs + targets
        assert text == list(range(text[0], text[0] + len(text)))
        assert len(targets) == 19
        prefixes.append(len(inputs))
    values, counts = np.unique(prefixes, return_counts=True)
    assert values.tolist() == list(range(4, 64))
    assert np.abs(counts / 50 - 1).max() < 0.6


def test_short_continuations_have_all_lengths(corpus, vocabulary):
    lengths = set()
    for inputs, targets in examples(SHORT, corpus, vocabulary, count=1000):
        assert targets[0] == inputs[-2] + 1
        lengths.add(len(targets) - 1)
    assert lengths == set(range(1, 20))


@ALL
def test_batches_are_their_examples(objective, corpus, vocabulary):
    batch = objective.batch(corpus, vocabulary, step=3, seed=5, batch_size=8)
    assert {key: value.shape for key, value in batch.items()} == {
        "inputs": (8, objective.inputs_length),
        "targets": (8, objective.targets_length),
    }
    assert {value.dtype for value in batch.values()} == {np.dtype(np.int32)}
    for row in range(8):
        example = objective.example(corpus, vocabulary, index=3 * 8 + row, seed=5)
        for key in ("inputs", "targets"):
            tokens = example[key]
            assert tokens[-1] == 1
            assert np.count_nonzero(tokens == 1) == 1
            assert batch[key][row, : len(tokens)].tolist() == tokens.tolist()
            assert not batch[key][row, len(tokens) :].any()


@ALL
def test_examples_depend_on_seed_and_index_alone(objective, corpus, vocabulary):
    def batch(*, step, seed, batch_size=8):
        made = objective.batch(corpus, vocabulary, step=step, seed=seed, batch_size=batch_size)
        return made["inputs"]

    np.testing.assert_array_equal(batch(step=2, seed=0), batch(step=2, seed=0))
    np.testing.assert_array_equal(batch(step=1, seed=0, batch_size=16)[:8], batch(step=2, seed=0))
    for other in (batch(step=3, seed=0), batch(step=2, seed=1), batch(step=2, seed=-1)):
        assert (other != batch(step=2, seed=0)).any(axis=1).all()
    many = batch(step=0, seed=0, batch_size=500)
    assert len(np.unique(many, axis=0)) > 490  # of 360,000 or more: hardly any twice


def test_numbers_stay_the_same():
    # A change here changes every run that is continued after it.
    corpus = Corpus(
        tokens=np.arange(3, 203, dtype=np.uint16), document_starts=np.zeros(1, np.int64)
    )
    objective = SpanCorruption(inputs_length=16, targets_length=8)
    example = objective.example(corpus, ByteVocabulary(), index=7, seed=1)
    assert example["inputs"].tolist() == [
        73,
        74,
        75,
        76,
        77,
        78,
        79,
        80,
        81,
        82,
        83,
        84,
        85,
        86,
        258,
        1,
    ]
    assert example["targets"].tolist() == [258, 87, 88, 89, 1]


def test_mixture_follows_its_weights(corpus, vocabulary):
    spans = 0
    for inputs, targets in examples(MIXED, corpus, vocabulary, count=2000):
        spans += vocabulary.sentinel(0) in inputs
        assert (vocabulary.sentinel(0) in inputs) == (targets[0] == vocabulary.sentinel(0))
        assert len(targets) in (14, 20), "the objective of weight 0"
    assert abs(spans / 2000 - 5 / 8) < 0.04


def test_mixture_can_hold_one_kind_per_step(corpus, vocabulary):
    mixture = Mixture(objectives=(SPANS, PREFIX), weights=(1, 1), consecutive=8)
    kinds = []
    for step in range(40):
        batch = mixture.batch(corpus, vocabulary, step=step, seed=0, batch_size=8)
        of_spans = (batch["inputs"] == vocabulary.sentinel(0)).any(axis=1)
        assert of_spans.all() or not of_spans.any()
        kinds.append(bool(of_spans[0]))
    assert 10 < sum(kinds) < 30


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpanCorruption(inputs_length=128, targets_length=28), "needs 29"),
        (lambda: SpanCorruption(inputs_length=2, targets_length=9), "inputs_length must be 3"),
        (
            lambda: SpanCorruption(inputs_length=9, targets_length=9, noise_density=1.0),
            "noise_density",
        ),
        (
            lambda: SpanCorruption(inputs_length=9, targets_length=9, mean_span_length=0.5),
            "mean_span_length",
        ),
        (lambda: PrefixLM(inputs_length=9, targets_length=9, min_prefix=9), "min_prefix"),
        (lambda: PrefixLM(inputs_length=9, targets_length=1), "targets_length 1"),
        (lambda: PrefixLM(inputs_length=9, targets_length=9, min_continuation=9), "not 9"),
        (lambda: Mixture(objectives=(), weights=()), "one weight per objective"),
        (lambda: Mixture(objectives=(SPANS,), weights=(0,)), "weights must be"),
        (lambda: Mixture(objectives=(SPANS,), weights=(1,), consecutive=0), "consecutive"),
        (
            lambda: Mixture(
                objectives=(SPANS, PrefixLM(inputs_length=64, targets_length=21)), weights=(1, 1)
            ),
            "differ",
        ),
    ],
)
def test_bad_fields_are_user_errors(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_corpus_of_one_window_is_enough_and_less_is_not(vocabulary):
    def corpus(length):
        tokens = np.arange(FIRST_ID, FIRST_ID + length, dtype=np.uint16)
        return Corpus(tokens=tokens, document_starts=np.zeros(1, np.int64))

    SPANS.example(corpus(70), vocabulary, index=0, seed=0)
    with pytest.raises(UserError, match="69 tokens, fewer than one example's 70"):
        SPANS.example(corpus(69), vocabulary, index=0, seed=0)


def test_more_spans_than_sentinels_is_a_user_error(corpus):
    with pytest.raises(UserError, match="<extra_id_2>"):
        SPANS.example(corpus, Vocabulary(TINY, extra_ids=2), index=0, seed=0)


def test_infilled_text_is_whole_in_the_targets(corpus, vocabulary) -> None:
    for inputs, targets in examples(INFILLING, corpus, vocabulary, count=20):
        assert targets == [*range(targets[0], targets[0] + 49), 1]
        sentinels = [t for t in inputs if t in {vocabulary.sentinel(i) for i in range(9)}]
        assert sentinels == [vocabulary.sentinel(i) for i in range(2)]  # 49 * 0.15 / 3
        kept = [t for t in inputs[:-1] if t not in sentinels]
        assert len(kept) == 49 - round(49 * 0.15)
        assert kept == sorted(kept)
        assert set(kept) < set(targets)


def test_deleted_tokens_leave_the_others_in_order(corpus, vocabulary) -> None:
    kept = 0
    for inputs, targets in examples(DELETION, corpus, vocabulary, count=200):
        assert targets == [*range(targets[0], targets[0] + 39), 1]
        assert inputs[:-1] == sorted(inputs[:-1])
        assert set(inputs) <= set(targets)
        kept += len(inputs) - 1
    assert abs(kept / (200 * 39) - 0.85) < 0.02


@pytest.mark.parametrize("objective", [TextInfilling, TokenDeletion])
def test_impossible_denoising(objective) -> None:
    for wrong in ({"noise_density": 1.0}, {"targets_length": 2}):
        with pytest.raises(UserError):
            objective(**{"inputs_length": 9, "targets_length": 9, **wrong})
