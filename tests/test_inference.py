"""Encode, generate and score: alone, in batches, and for several members at once."""

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.api import (
    as_prompt,
    encode,
    generate,
    logits,
    padded_size,
    score,
    token_ids,
)
from prompt_tuning_jax.inference.ensemble import (
    DecodeConfig,
    encoded,
    label_scores,
    target_logits,
    target_scores,
    write,
)
from prompt_tuning_jax.methods import PROMPT, NoTuning, PromptTuning
from prompt_tuning_jax.methods.base import TunedModel, TuningModule
from prompt_tuning_jax.methods.prompt import with_prompt
from prompt_tuning_jax.models.injections import Injections
from tests.micro import (
    EOS,
    ONE_LAYER,
    D,
    V,
    Words,
    call,
    make_prefixes,
    make_t5,
    normal,
    shifted,
    token_rows,
)

MODEL = make_t5(ONE_LAYER)
SOURCE = token_rows([5, 3, 6], 7)
TARGET = token_rows([4, 2, 3], 5, seed=1)
PROMPT_PD = normal(3, D, seed=2)
PROMPTS_EPD = normal(3, 3, D, seed=3)
LABELS = token_rows([2, 4, 3, 2], 4, seed=5)
LENGTH = 6


def log_probs(model, source, target, prompt=None):
    """Summed log-probability of targets by hand, from the model's logits."""
    logits = np.asarray(call(model, source, shifted(target), prompt), np.float64)
    log_z = np.log(np.exp(logits).sum(axis=-1))
    picked = np.take_along_axis(logits, target[..., None], axis=-1)[..., 0] - log_z
    return (picked * (target != 0)).sum(axis=-1)


def members(prompts_EPD, method=None):
    method = method or PromptTuning(length=prompts_EPD.shape[1])
    graphdef, params = param_tree.split(with_prompt(MODEL, prompts_EPD[0], method))
    trainable, frozen = param_tree.partition(params, {name: name == PROMPT for name in params})
    assert trainable.keys() == {PROMPT}
    return graphdef, {PROMPT: jnp.asarray(prompts_EPD)}, frozen


@pytest.mark.parametrize("prompt", [None, PROMPT_PD], ids=["bare", "prompt"])
def test_score_is_the_sum_of_log_probabilities(prompt):
    got = score(MODEL, SOURCE, TARGET, prompt)
    assert got.shape == (3,) and got.dtype == np.float32
    np.testing.assert_allclose(got, log_probs(MODEL, SOURCE, TARGET, prompt), atol=1e-4)


def test_encode_is_the_models():
    got = encode(MODEL, SOURCE, PROMPT_PD)
    assert got.shape == (3, 3 + 7, D)
    want = jax.jit(lambda: MODEL.encode(SOURCE, PROMPT_PD).hidden_BUD)()
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_label_scores_of_several_members_are_score_by_score():
    graphdef, trainable, frozen = members(PROMPTS_EPD)
    got = np.asarray(label_scores(graphdef, trainable, frozen, SOURCE, LABELS, 3))
    assert got.shape == (3, 3, 4)
    for e, c in np.ndindex(3, 4):
        target = np.broadcast_to(LABELS[c], (3, 4))
        want = log_probs(MODEL, SOURCE, target, PROMPTS_EPD[e])
        np.testing.assert_allclose(got[e, :, c], want, atol=1e-4)


def strategies():
    yield DecodeConfig(strategy="greedy", max_length=LENGTH)
    yield DecodeConfig(strategy="beam", max_length=LENGTH, num_beams=3)


@pytest.mark.parametrize("writing", list(strategies()), ids=lambda w: w.strategy)
def test_members_together_write_what_each_writes_alone(writing):
    graphdef, trainable, frozen = members(PROMPTS_EPD)
    key = jax.random.key(0)
    ids, scores = write(graphdef, writing, trainable, frozen, SOURCE, key)
    beams = (writing.num_beams,) if writing.strategy == "beam" else ()
    assert ids.shape == (3, 3, *beams, LENGTH) and scores.shape == (3, 3, *beams)
    for e in range(3):
        kwargs = {"num_beams": 3} if beams else {}
        alone = generate(
            MODEL, SOURCE, PROMPTS_EPD[e], writing.strategy, max_length=LENGTH, **kwargs
        )
        np.testing.assert_array_equal(ids[e], alone.ids)
        np.testing.assert_allclose(scores[e], alone.scores, atol=1e-4)
    assert len(np.unique(np.asarray(ids).reshape(3, -1), axis=0)) == 3  # members differ


def test_greedy_writes_the_most_probable_token_and_its_score_is_that_of_its_ids():
    written = generate(MODEL, SOURCE, PROMPT_PD, max_length=LENGTH)
    logits = np.asarray(call(MODEL, SOURCE, shifted(written.ids), PROMPT_PD))
    for ids_S, logits_SV in zip(written.ids, logits, strict=True):
        end = np.flatnonzero(ids_S == EOS)
        length = end[0] + 1 if len(end) else LENGTH
        np.testing.assert_array_equal(ids_S[:length], logits_SV.argmax(axis=-1)[:length])
        assert not ids_S[length:].any()
    # A row that wrote padding as a token would not count it here; this seed writes none.
    np.testing.assert_allclose(
        written.scores, log_probs(MODEL, SOURCE, written.ids, PROMPT_PD), atol=1e-4
    )
    assert written.texts is None


def test_beams_are_sorted_differ_and_one_beam_is_greedy():
    beams = generate(MODEL, SOURCE, PROMPT_PD, "beam", max_length=LENGTH, num_beams=3)
    assert beams.ids.shape == (3, 3, LENGTH)
    assert (np.diff(beams.scores, axis=1) <= 0).all()
    for row in beams.ids:
        assert len(np.unique(row, axis=0)) == 3
    one = generate(
        MODEL, SOURCE, PROMPT_PD, "beam", max_length=LENGTH, num_beams=1, length_penalty=0.0
    )
    greedy = generate(MODEL, SOURCE, PROMPT_PD, max_length=LENGTH)
    np.testing.assert_array_equal(one.ids[:, 0], greedy.ids)
    np.testing.assert_allclose(one.scores[:, 0], greedy.scores, atol=1e-4)


def test_hugging_faces_rule_scores_by_its_penalty():
    beams = generate(
        MODEL, SOURCE, PROMPT_PD, "beam",
        max_length=LENGTH, num_beams=3, length_penalty=2.0, beam_rule="hf",
    )  # fmt: skip
    for k in range(3):
        lengths = np.array(
            [(np.flatnonzero(row == EOS)[:1] + 1).tolist() or [LENGTH] for row in beams.ids[:, k]]
        )[:, 0]
        want = log_probs(MODEL, SOURCE, beams.ids[:, k], PROMPT_PD) / lengths**2.0
        np.testing.assert_allclose(beams.scores[:, k], want, atol=1e-4)


def test_results_do_not_depend_on_the_batch():
    def all_of(source, target):
        written = generate(MODEL, source, PROMPT_PD, max_length=LENGTH)
        beams = generate(MODEL, source, PROMPT_PD, "beam", max_length=LENGTH, num_beams=3)
        return written.ids, beams.ids, score(MODEL, source, target, PROMPT_PD)

    together = all_of(SOURCE, TARGET)
    for row in range(3):
        for got, want in zip(
            all_of(SOURCE[row : row + 1], TARGET[row : row + 1]), together, strict=True
        ):
            np.testing.assert_allclose(got[0], want[row], atol=1e-4)


@pytest.mark.parametrize("strategy", ["greedy", "beam"])
def test_a_prompt_per_example_is_each_examples_own(strategy):
    beams = {"num_beams": 2} if strategy == "beam" else {}
    each = generate(MODEL, SOURCE, PROMPTS_EPD, strategy, max_length=LENGTH, **beams)
    for row in range(3):
        one = generate(MODEL, SOURCE, PROMPTS_EPD[row], strategy, max_length=LENGTH, **beams)
        np.testing.assert_array_equal(each.ids[row], one.ids[row])
        np.testing.assert_allclose(each.scores[row], one.scores[row], atol=1e-4)
    copies = np.broadcast_to(PROMPT_PD, (3, 3, D))
    np.testing.assert_allclose(
        score(MODEL, SOURCE, TARGET, copies), score(MODEL, SOURCE, TARGET, PROMPT_PD), atol=1e-4
    )


def test_sampling_follows_its_seed_and_at_top_one_is_greedy():
    model = make_t5(ONE_LAYER)

    def ids(**kwargs):
        return generate(model, SOURCE, PROMPT_PD, "sample", max_length=LENGTH, **kwargs).ids

    np.testing.assert_array_equal(ids(seed=4), ids(seed=4))
    assert (ids(seed=4) != ids(seed=5)).any()
    greedy = generate(model, SOURCE, PROMPT_PD, max_length=LENGTH).ids
    np.testing.assert_array_equal(ids(top_k=1, seed=6), greedy)


class Prefixes(TuningModule):
    """A method of the family that fills key/value slots, one per example."""

    def injections(self, model, tokens_BT, *, task_B=None, key=None):
        layers = {"layers": 1, "batch": len(tokens_BT)}
        return Injections(
            prefixes={
                "decoder": make_prefixes(ONE_LAYER, **layers, seed=1),
                "cross": make_prefixes(ONE_LAYER, **layers, seed=2),
            }
        )


@pytest.mark.parametrize("writing", list(strategies()), ids=lambda w: w.strategy)
def test_prefixes_per_example_follow_their_example_into_decoding(writing):
    graphdef, frozen = param_tree.split(TunedModel(make_t5(ONE_LAYER), Prefixes(NoTuning())))
    ids, scores = write(
        graphdef, replace(writing, num_beams=2), {}, frozen, SOURCE, jax.random.key(0)
    )
    best_BS = np.asarray(ids[0] if ids.ndim == 3 else ids[0, :, 0])
    attached = param_tree.merge(graphdef, frozen)
    logits = np.asarray(jax.jit(lambda t: attached(SOURCE, t))(best_BS))
    total = np.take_along_axis(jax.nn.log_softmax(logits), best_BS[..., None], axis=-1)[..., 0]
    total = (np.asarray(total) * (best_BS != 0)).sum(axis=-1)
    if writing.strategy == "greedy":
        np.testing.assert_allclose(scores[0], total, atol=1e-4)
    else:
        lengths = (best_BS != 0).sum(axis=-1)
        ended = (best_BS == EOS).any(axis=-1)
        penalty = np.where(ended, ((5 + lengths) / 6) ** 0.6, 1.0)
        np.testing.assert_allclose(scores[0, :, 0], total / penalty, atol=1e-4)


@dataclass
class Model:
    """What ``token_ids`` looks at."""

    vocabulary: Words | None = None

    input_eos = EOS
    token_ids = MODEL.token_ids

    @property
    def config(self):
        return MODEL.config


def test_texts_become_padded_rows_that_end():
    words = Words()
    ids = token_ids(Model(words), ["aa bc", "xy", ""])
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(
        ids, [[*words.encode("aa bc"), EOS], [*words.encode("xy"), EOS, 0], [EOS, 0, 0]]
    )
    np.testing.assert_array_equal(token_ids(Model(words), "aa bc"), ids[:1])
    for texts in (np.asarray(["aa bc", "xy", ""]), np.asarray(["aa bc", "xy", ""], object)):
        np.testing.assert_array_equal(token_ids(Model(words), texts), ids)


def test_ids_pass_through():
    for given in (SOURCE, jnp.asarray(SOURCE), SOURCE.astype(np.int64), SOURCE.tolist()):
        got = token_ids(Model(), given)
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, SOURCE)


def test_lists_of_ids_may_have_different_lengths():
    np.testing.assert_array_equal(token_ids(Model(), [[5, 1], [5, 6, 1]]), [[5, 1, 0], [5, 6, 1]])
    rows = [row[row != 0].tolist() for row in SOURCE]
    np.testing.assert_array_equal(token_ids(Model(), rows), SOURCE[:, : max(map(len, rows))])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("text", "came without a vocabulary: give token ids"),
        (["text", "more"], "came without a vocabulary"),
        (np.zeros((2, 0), np.int32), r"\[2, 0\]; give every row at least one"),
        (np.zeros((0, 2), np.int32), "there are no inputs"),
        ([[], []], r"inputs\[0\] has no token ids; give every row at least one"),
        ([[5, 1], []], r"inputs\[1\] has no token ids"),
        ([b"text"], r"inputs\[0\] is bytes; decode it to a text"),
        (np.array([b"text"], object), r"inputs\[0\] is bytes"),
        (np.int32(3), "got a single number"),
        (3, "inputs is a int; give a text"),
        (np.asarray([["a"]]), r"an array of texts has shape \[batch\]; got \[1, 1\]"),
        (SOURCE[0], r"shape \[batch, length\]; got int32 \[7\]"),
        (SOURCE[None], r"got int32 \[1, 3, 7\]"),
        (SOURCE * 1.0, "whole numbers of shape .* got float64"),
        (SOURCE != 0, "whole numbers of shape .* got bool"),
        (SOURCE + V, f"from 0 to {V - 1}; got {V} to"),
        (SOURCE - 1, f"from 0 to {V - 1}; got -1 to"),
        ([[5, 1], [5, 6.5, 1]], "whole numbers of shape .* got float64"),
        ([[5, 1], [5, V, 1]], f"from 0 to {V - 1}; got 1 to {V}"),
        (["text", 3], r"inputs\[1\] is '3'; it must be a text"),
        ([np.asarray([5, 1]), np.asarray([5])], "of different lengths must be a list of lists"),
        ([[5, 1], 5], "of different lengths"),
        ([[[5], [5, 1]]], "of different lengths"),
    ],
)
def test_wrong_ids_are_refused_in_one_line(inputs, message):
    with pytest.raises(UserError, match=message) as error:
        token_ids(Model(), inputs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(3, D + 1), (2, 3, D), (D,), (1, 3, 3, D)])
def test_a_prompt_that_does_not_fit_is_refused(shape):
    with pytest.raises(UserError, match=rf"\[P, {D}\] or \[3, P, {D}\]; got \[{shape[0]}"):
        generate(MODEL, SOURCE, np.zeros(shape, np.float32))
    for path in ("runs/lora", Path("runs/lora")):
        with pytest.raises(UserError, match="'runs/lora' is a path: attach takes a run"):
            generate(MODEL, SOURCE, path)
    assert as_prompt(MODEL, None, batch=3) is None
    assert as_prompt(MODEL, PROMPTS_EPD.astype(np.float16), batch=3).dtype == jnp.float32


def test_as_many_targets_as_inputs():
    with pytest.raises(UserError, match="3 inputs and 2 targets"):
        score(MODEL, SOURCE, TARGET[:2])


def test_texts_in_texts_out():
    model = make_t5(ONE_LAYER)
    model.vocabulary = words = Words()
    written = generate(model, ["aa bc", "xy"], PROMPT_PD, max_length=4)
    ids = token_ids(model, ["aa bc", "xy"])
    np.testing.assert_array_equal(written.ids, generate(model, ids, PROMPT_PD, max_length=4).ids)
    assert written.texts == [words.decode(row.tolist()) for row in written.ids]
    np.testing.assert_allclose(
        score(model, ["aa bc", "xy"], ["q", "r s"], PROMPT_PD),
        score(model, ids, token_ids(model, ["q", "r s"]), PROMPT_PD),
        atol=1e-6,
    )


def test_padded_sizes_hold_what_they_are_for():
    assert [padded_size(n) for n in (1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49)] == [
        *(1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    ]
    assert [padded_size(n, least=16) for n in (1, 16, 17, 100, 129)] == [16, 16, 24, 128, 192]


def of_length(tokens, length):
    """The same rows with more padding, or cut."""
    return np.pad(tokens, ((0, 0), (0, length)))[:, :length]


def test_programs_are_compiled_for_few_lengths_and_numbers_of_rows():
    """Not one for each."""
    model, prompt = make_t5(ONE_LAYER), normal(3, D, seed=2)
    programs = {
        encoded: lambda source, target: encode(model, source, prompt),
        write: lambda source, target: generate(model, source, prompt, max_length=3),
        target_scores: lambda source, target: score(model, source, target, prompt),
        target_logits: lambda source, target: logits(model, source, target, prompt),
    }
    for program, call_it in programs.items():
        before = program._cache_size()
        for length in range(17, 25):  # rows of up to six tokens
            rows = 5 + length % 2
            call_it(of_length(token_rows([5] * rows, 7), length), token_rows([3] * rows, 5))
        assert program._cache_size() == before + 1, program


@pytest.mark.parametrize("placement", ["prefix", "after_first", "before_eos"])
def test_padding_changes_no_number_and_no_shape(placement):
    """Against each row by itself, without any padding."""
    source, target = token_rows([6, 20, 3, 9, 1], 20), token_rows([4, 2, 3, 5, 1], 5, seed=1)
    source[[0, 3, 4], [6, 9, 1]] = EOS  # others end by a cut
    attached = with_prompt(MODEL, jnp.asarray(PROMPT_PD), PromptTuning(placement=placement))
    hidden = encode(attached, source)
    found = logits(attached, source, target)
    assert hidden.shape == (5, 3 + 20, D) and found.shape == (5, 5, V)
    assert found.dtype == np.float32
    written = generate(attached, source, max_length=4)
    assert written.ids.shape == (5, 4) and written.scores.shape == (5,)
    scores = score(attached, source, target)

    @jax.jit
    def unpadded(source, target):
        return attached.read(source)[0].hidden_BUD[0], attached(source, target)[0]

    for row in (1, 2):  # the longest, and one with much padding
        own, wanted = (ids[row][ids[row] != 0][None] for ids in (source, target))
        alone, exact = unpadded(own, wanted)
        np.testing.assert_allclose(hidden[row, : len(alone)], alone, atol=1e-5)
        np.testing.assert_allclose(found[row, : len(exact)], exact, atol=1e-4)
        log_p = jax.nn.log_softmax(exact)[np.arange(len(exact)), wanted[0]].sum()
        np.testing.assert_allclose(scores[row], log_p, atol=1e-4)
        np.testing.assert_array_equal(
            written.ids[row], generate(attached, own, max_length=4).ids[0]
        )


def test_a_prompt_per_example_is_padded_with_its_rows():
    rows = token_rows([5, 3, 6, 4, 2], 7)
    prompts_BPD = normal(5, 3, D, seed=9)
    together = score(MODEL, rows, rows, prompts_BPD)
    attached = with_prompt(MODEL, jnp.asarray(prompts_BPD))
    np.testing.assert_allclose(score(attached, rows, rows), together, atol=1e-5)
    for row, prompt_PD in enumerate(prompts_BPD):
        alone = score(MODEL, rows[row : row + 1], rows[row : row + 1], prompt_PD)
        np.testing.assert_allclose(together[row], alone[0], atol=1e-4)


def test_sampling_does_not_depend_on_rows_to_spare():
    """Five rows are computed as six."""
    rows = token_rows([5, 3, 6, 4, 2], 7)
    five = generate(MODEL, rows, strategy="sample", seed=3, max_length=5).ids
    six = generate(MODEL, rows[[0, 1, 2, 3, 4, 4]], strategy="sample", seed=3, max_length=5).ids
    np.testing.assert_array_equal(five, six[:5])


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        ("greedy", {"num_beams": 4}, "num_beams is 4, and it is for strategy='beam'"),
        ("sample", {"length_penalty": 0.5}, "length_penalty is 0.5, and it is for strategy='beam'"),
        ("greedy", {"beam_rule": "hf"}, "beam_rule is 'hf', and it is for strategy='beam'"),
        ("greedy", {"temperature": 0.7}, "temperature is 0.7, and it is for strategy='sample'"),
        ("beam", {"top_p": 0.9}, "top_p is 0.9, and it is for strategy='sample'"),
        ("greedy", {"top_k": 3}, "top_k is 3, and it is for strategy='sample'"),
        ("beams", {}, "strategy is 'beams'; choose"),
        ("beam", {"beam_rule": "t5"}, "beam_rule is 't5'; choose t5x or hf"),
        ("beam", {"length_penalty": -1.0}, "length_penalty is -1.0; beam_rule t5x takes 0 or more"),
        ("beam", {"length_penalty": np.nan}, "length_penalty is nan; it must be a finite number"),
        ("beam", {"num_beams": True}, "num_beams is True; it must be a whole number"),
        ("beam", {"num_beams": 2.0}, "num_beams is 2.0; it must be a whole number"),
        ("greedy", {"max_length": 8.0}, "max_length is 8.0; it must be a whole number"),
        ("greedy", {"max_length": "8"}, "max_length is '8'; it must be a whole number"),
        ("greedy", {"max_length": 0}, "max_length is 0; it must be at least 1"),
        ("sample", {"seed": 1.5}, "seed is 1.5; it must be a whole number"),
        ("sample", {"seed": -1}, "seed is -1; it must be at least 0"),
        ("sample", {"top_k": -1}, "top_k is -1; it must be at least 0"),
        ("sample", {"top_p": 0.0}, "top_p is 0.0; it must be above 0"),
        ("sample", {"top_p": 1.5}, "top_p is 1.5; it must be at most 1"),
        ("sample", {"top_p": np.nan}, "top_p is nan; it must be a finite number"),
        ("sample", {"temperature": np.nan}, "temperature is nan; it must be a finite number"),
        ("sample", {"temperature": np.inf}, "temperature is inf; it must be a finite number"),
        ("sample", {"temperature": -1}, "temperature is -1.0; it must be 0"),
        ("greedy", {"min_length": 7}, "min_length is 7; it must be at most 6"),
        ("greedy", {"min_length": -1}, "min_length is -1; it must be at least 0"),
        ("greedy", {"max_length": 10**12}, "max_length is 1000000000000; it must be at most"),
        ("beam", {"num_beams": 10**9}, "num_beams is 1000000000; it must be at most"),
        ("greedy", {"no_repeat_ngram_size": 10**20}, "no_repeat_ngram_size is 1.*at most"),
        ("sample", {"seed": 10**30}, "seed is 1.*at most"),
        ("greedy", {"repetition_penalty": 0}, "repetition_penalty is 0.0; it must be above 0"),
        ("greedy", {"repetition_penalty": np.nan}, "repetition_penalty is nan"),
        (
            "greedy",
            {"no_repeat_ngram_size": 1.0},
            "no_repeat_ngram_size is 1.0; it must be a whole",
        ),
    ],
)
def test_options_that_are_wrong_or_anothers_are_refused_by_name(strategy, options, message):
    with pytest.raises(UserError, match=message) as error:
        generate(MODEL, SOURCE, None, strategy, **{"max_length": LENGTH, **options})
    assert "\n" not in str(error.value)


def test_numbers_of_numpy_are_numbers():
    given = {"max_length": np.int64(LENGTH), "num_beams": np.int32(3)}
    got = generate(MODEL, SOURCE, PROMPT_PD, "beam", **given)
    want = generate(MODEL, SOURCE, PROMPT_PD, "beam", max_length=LENGTH, num_beams=3)
    np.testing.assert_array_equal(got.ids, want.ids)


def test_a_negative_length_penalty_is_for_the_rule_that_takes_it():
    rule = {"beam_rule": "hf", "length_penalty": -1.0}
    assert generate(MODEL, SOURCE, PROMPT_PD, "beam", max_length=LENGTH, num_beams=3, **rule)


def test_a_normalised_score_is_the_mean_over_tokens():
    total = score(MODEL, SOURCE, TARGET, PROMPT_PD)
    mean = score(MODEL, SOURCE, TARGET, PROMPT_PD, normalize_length=True)
    np.testing.assert_allclose(mean, total / (TARGET != 0).sum(axis=1), rtol=1e-5)
    with pytest.raises(UserError, match="normalize_length is 1; it must be True or False"):
        score(MODEL, SOURCE, TARGET, normalize_length=1)


def test_labels_are_ranked_by_their_mean_where_that_is_asked_for():
    graphdef, trainable, frozen = members(PROMPTS_EPD)
    given = graphdef, trainable, frozen, SOURCE, LABELS, 3
    total = np.asarray(label_scores(*given))
    mean = np.asarray(label_scores(*given, normalize_length=True))
    np.testing.assert_allclose(mean, total / (LABELS != 0).sum(axis=1), rtol=1e-5)
    assert (mean.argsort(-1) != total.argsort(-1)).any()


@pytest.mark.parametrize("prompt", [np.array(["a"]), ["a", "b"], {}, [[1.0], [1.0, 2.0]]])
def test_a_prompt_without_numbers_is_refused_in_one_line(prompt):
    with pytest.raises(UserError, match="prompt"):
        as_prompt(MODEL, prompt, batch=1)
