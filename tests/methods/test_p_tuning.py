"""Templates put vectors where they say, and P-tuning's prompt folds into plain vectors there."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.config.prompt_template import parse_prompt_template
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods import Context, PromptTuning, PTuning, TunedModel, attach_method
from prompt_tuning_jax.methods.template import place, put
from prompt_tuning_jax.models.base import joined
from prompt_tuning_jax.models.injections import ModelInput
from tests.micro import EOS, ONE_LAYER, D, Words, make_t5, normal, shifted, token_rows

# With and without room, one that was cut (no end of sequence), one of nothing but its end.
SOURCE = token_rows([7, 5, 3, 1], 7)
SOURCE[0, 6] = 9
TARGET = token_rows([4, 6, 2, 3], 6, seed=1)


@pytest.mark.parametrize(
    "template",
    [
        "{prompt} {input}",
        "{input} {prompt}",
        "{prompt:1} {input:2} {prompt} {input} {prompt:2}",
        "{input:1} {prompt:1} {input:3} {prompt:1} {input} {prompt:1}",
    ],
)
def test_vectors_stand_where_the_template_says(template: str) -> None:
    parsed = parse_prompt_template(template, length=3)
    behind = place(parsed, None).behind
    assert len(behind) == parsed.prompt_length
    vectors, embedded = normal(len(behind), 2), normal(4, 7, 2, seed=1)
    source = ModelInput(embeddings_BUD=jnp.asarray(embedded), mask_BU=jnp.asarray(SOURCE != 0))
    got = joined(put(jnp.asarray(vectors), source, SOURCE, behind))
    for row, tokens, found, mask in zip(
        embedded, SOURCE, got.embeddings_BUD, got.mask_BU, strict=True
    ):
        words = int(((tokens != 0) & (tokens != EOS)).sum())
        real = int((tokens != 0).sum())
        want: list[np.ndarray] = []
        for position in range(words + 1):
            for vector, after in zip(vectors, behind, strict=True):
                if (words if after < 0 else min(after, words)) == position:
                    want.append(vector)
            want += [row[position]] if position < real else []
        want += list(row[words + 1 : real])
        np.testing.assert_array_equal(found[: len(want)], np.stack(want))
        assert mask[: len(want)].all() and not mask[len(want) :].any()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{prompt}", "must have {input} once"),
        ("{input} {input}", "must have {input} once"),
        ("{input} {input:2}", "behind every {input:N}"),
        ("{promt} {input}", "{promt} is not a valid piece"),
        ("{prompt:0} {input}", "{prompt:0} is not a valid piece"),
        ("{prompt {input}", "unmatched brace"),
        ("words {input}", "has no {prompt}"),
    ],
)
def test_a_wrong_template_is_refused(template: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(PTuning(template=template).config_errors())


def logits(attached: Any, *given: Any) -> np.ndarray:
    graphdef, params = param_tree.split(attached)
    return np.asarray(jax.jit(lambda p: param_tree.merge(graphdef, p)(*given))(params))


def attach(method: Any, vocabulary: Words | None = None) -> TunedModel:
    attached: TunedModel = attach_method(
        make_t5(ONE_LAYER), method, key=jax.random.key(1), context=Context(vocabulary=vocabulary)
    )
    return attached


def test_anchors_are_words_before_the_input() -> None:
    method = PTuning(length=2, encoder="none", template="{prompt} xy zu {input}")
    attached = attach(method, Words())
    tokens = np.pad(SOURCE, ((0, 0), (2, 0)))
    tokens[:, :2] = Words().encode("xy zu")
    want = logits(
        make_t5(ONE_LAYER), tokens, shifted(TARGET), attached.method.prompt_PD.get_value()
    )
    np.testing.assert_allclose(logits(attached, SOURCE, TARGET), want, atol=1e-5)
    with pytest.raises(UserError, match="'xy zu' and the model no vocabulary"):
        attach(method)


@pytest.mark.parametrize(
    ("encoder", "template", "kept"),
    [
        ("lstm", "{prompt} a {input}", PromptTuning(length=3, init="uniform")),
        (
            "mlp",
            "{input} {prompt:3}",
            PromptTuning(length=3, init="uniform", placement="before_eos"),
        ),
        ("none", "{prompt} a {input}", PromptTuning(length=3, init="uniform")),
        (
            "lstm",
            "{prompt:1} a {input:1} b {input} {prompt:1}",
            PTuning(
                length=2,
                encoder="none",
                template="{prompt:2} {input:1} {prompt:1} {input} {prompt:1}",
            ),
        ),
    ],
    ids=["lstm before", "mlp behind", "none before", "lstm adapter"],
)
def test_what_is_kept_is_plain_and_computes_the_same(
    encoder: Any, template: str, kept: Any
) -> None:
    method = PTuning(length=2, hidden=4, encoder=encoder, template=template, dropout=0.0)
    attached = attach(method, Words())
    for_inference = attached.for_inference()
    found = for_inference.method.config
    assert found == kept.as_trained()
    assert found.prompt_positions() == len(attached.method.placed.anchors)
    own = param_tree.select(param_tree.split(for_inference)[1], found.trains)
    assert param_tree.count(own) == found.prompt_positions() * D
    want = logits(attached, SOURCE, TARGET)
    np.testing.assert_allclose(logits(for_inference, SOURCE, TARGET), want, atol=1e-5)
    again = attach(found)  # with no vocabulary
    param_tree.require_same_shapes(
        own, param_tree.select(param_tree.split(again)[1], found.trains), of="kept", and_of="new"
    )


def test_an_encoder_mixes_positions_or_does_not() -> None:
    """An LSTM's vectors depend on those on both sides; an MLP's on their own alone."""
    for encoder, mixes in (("lstm", True), ("mlp", False)):
        prompt = attach(PTuning(length=4, hidden=4, encoder=encoder)).method
        before = np.asarray(prompt.prompt())
        value = prompt.prompt_PD.get_value()
        prompt.prompt_PD.set_value(value.at[1].add(1.0))
        moved = np.abs(np.asarray(prompt.prompt()) - before).max(axis=1) > 1e-7
        assert moved.tolist() == [mixes, True, mixes, mixes]
