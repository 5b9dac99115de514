"""Gated prompts in the attention of the top layers are what their formula says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.peft.prompts import write_peft_prompts
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference import api
from prompt_tuning_jax.methods import AdaptionPrompt, Context, TunedModel, attach_method
from prompt_tuning_jax.methods.merging import merge
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.models.causal_lm.attention import Attention
from tests.micro import make_t5
from tests.tiny_lm import FAMILIES, D, L, make_lm
from tests.tiny_t5gemma import make_t5gemma

ROWS = [[5, 6, 7, 8, 9], [10, 11]]


def attached(model: Model, method: AdaptionPrompt, *, gate: float = 0.0) -> TunedModel:
    """The method with random prompts, and gates of this value."""
    tuned = attach_method(model, method, key=jax.random.key(1), context=Context())
    graphdef, params = param_tree.split(tuned)
    gates = {name: jnp.full(1, gate) for name in params if name.endswith("/gate")}
    merged: TunedModel = param_tree.merge(graphdef, {**params, **gates})
    return merged


def mixed_by_hand(attention: Attention, x_TD: np.ndarray, prompt_PD: np.ndarray) -> np.ndarray:
    """What queries without positions mix of a prompt's values, ``[T, H * K]``, in plain numpy."""

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        layer = getattr(attention, name)
        y = x @ np.asarray(layer.kernel.get_value())
        return y if layer.bias is None else y + np.asarray(layer.bias.get_value())

    heads, groups, width = attention.num_heads, attention.num_kv_heads, attention.head_dim
    query_THK = linear("query", x_TD).reshape(len(x_TD), heads, width) * attention.query_scale
    keys_PGK = linear("key", prompt_PD).reshape(len(prompt_PD), groups, width)
    values_PGK = linear("value", prompt_PD).reshape(len(prompt_PD), groups, width)
    mixed = []
    for head in range(heads):
        group = head * groups // heads
        scores_TP = query_THK[:, head] @ keys_PGK[:, group].T
        weights_TP = np.exp(scores_TP - scores_TP.max(axis=1, keepdims=True))
        mixed.append(weights_TP / weights_TP.sum(axis=1, keepdims=True) @ values_PGK[:, group])
    return np.concatenate(mixed, axis=1)


@pytest.mark.parametrize("project", [True, False], ids=["projected", "behind the output map"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_attention_adds_its_gated_prompt(family: str, project: bool) -> None:
    changes = {} if project else {"num_heads": 3, "num_kv_heads": 3}  # heads of the model's width
    model = make_lm(family, **changes)
    tuned = attached(model, AdaptionPrompt(length=3, project=project), gate=0.7)
    plain, gated = (each.decoder.layer(1).self_attention for each in (model, tuned.model))
    random = np.random.default_rng(0)
    x_TD = random.normal(size=(4, D)).astype(np.float32)

    def out(attention: Attention) -> np.ndarray:
        own = attention.keys_values(x_TD[None], None)
        return np.asarray(attention(jnp.asarray(x_TD[None]), None, [own], [None])[0])

    added_TJ = 0.7 * mixed_by_hand(gated, x_TD, np.asarray(gated.adapter.prompt_PD.get_value()))
    if project:
        added_TJ = added_TJ @ np.asarray(plain.out.kernel.get_value())
    np.testing.assert_allclose(out(gated), out(plain) + added_TJ, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_starts_from_the_unchanged_model(family: str) -> None:
    model = make_lm(family)
    want = api.logits(model, ROWS)
    np.testing.assert_allclose(api.logits(attached(model, AdaptionPrompt()), ROWS), want, atol=1e-6)
    changed = api.logits(attached(model, AdaptionPrompt(), gate=1.0), ROWS)
    assert (np.abs(changed - want)[0].max(axis=1) > 1e-3).all()  # at every position


def test_what_passes_no_output_map_has_the_models_width() -> None:
    with pytest.raises(UserError, match=r"method\.project=false needs .*, 12; here they are 24"):
        attached(make_lm(), AdaptionPrompt(project=False))


def test_layers_count_from_the_top() -> None:
    names = param_tree.split(attached(make_lm(), AdaptionPrompt(layers=1)))[1]
    prompts = [name for name in names if name.endswith("adapter/prompt_PD")]
    assert prompts == [f"model/decoder/layers_{L - 1}/self_attention/adapter/prompt_PD"]


def test_decoding_and_scoring_agree() -> None:
    tuned = attached(make_lm(), AdaptionPrompt(length=4), gate=1.0)
    written = api.generate(tuned, ROWS, max_length=4).ids
    whole = [row + out.tolist() for row, out in zip(ROWS, written, strict=True)]
    logits = api.logits(tuned, whole)
    for row, out, row_logits in zip(ROWS, written, logits, strict=True):
        behind = row_logits[len(row) - 1 : len(row) - 1 + len(out)]
        assert behind.argmax(axis=-1).tolist()[:2] == out.tolist()[:2]


def test_t5gemma_reads_with_gated_prompts() -> None:
    model = make_t5gemma("t5gemma")
    tuned = attached(model, AdaptionPrompt(length=2), gate=1.0)
    names = param_tree.split(tuned)[1]
    assert any("/encoder/layers_0/self_attention/adapter/" in name for name in names)
    targets = [[7, 8], [9]]
    changed = api.logits(tuned, ROWS, targets) - api.logits(model, ROWS, targets)
    assert np.abs(changed).max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "for llama, mistral, gpt2, not for qwen2"),
        ({"out_bias": True}, "bias of the attention's output map a second time"),
        ({"query_scale": 1.0}, r"scale queries by 1/sqrt\(4\); this model scales them by 1"),
        ({"head_dim": 2, "query_scale": 2**-0.5}, "the model's width, 12, together"),
        ({"num_heads": 3}, "need method.project=true; this one has false"),
    ],
    ids=["family", "bias", "scale", "heads", "project"],
)
def test_what_peft_cannot_compute_is_not_written(
    tmp_path: object, changes: dict[str, object], message: str
) -> None:
    model = make_lm(**{"num_heads": 3, **changes})
    method = AdaptionPrompt(length=2, project="num_heads" not in changes)
    tuned = attached(model, method)
    arrays = {name: each for name, each in param_tree.split(tuned)[1].items() if "adapter/" in name}
    with pytest.raises(UserError, match=message):
        write_peft_prompts(
            f"{tmp_path}/a", method, arrays, config=model.config, base_model_name_or_path="m"
        )


def test_other_models_and_too_many_layers_are_refused() -> None:
    with pytest.raises(
        UserError, match="decoder-only models and T5Gemma, and this is a T5; use pref"
    ):
        attached(make_t5(), AdaptionPrompt())
    with pytest.raises(UserError, match=f"method.layers is 9, and the decoder has {L} layers"):
        attached(make_lm(), AdaptionPrompt(layers=9))


def test_gated_prompts_are_not_merged_and_not_left_in_a_plain_model() -> None:
    tuned = attached(make_lm(), AdaptionPrompt(length=3, layers=1))
    with pytest.raises(UserError, match=r"adapter/\w+ cannot be merged into a weight"):
        merge(tuned)
