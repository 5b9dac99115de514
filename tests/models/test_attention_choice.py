"""Which implementation of attention is chosen where, and what is said about it."""

import dataclasses
from typing import Any

import pytest

from prompt_tuning_jax.config.experiment import Data, Experiment, Model
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.setup import attention_for, build_model, partitioner_of
from prompt_tuning_jax.methods import FullTuning, PromptTuning
from prompt_tuning_jax.models.ops import attention_choice
from prompt_tuning_jax.models.ops.attention_choice import (
    AttentionTraits,
    Choice,
    Usage,
    choose_attention,
)
from tests import micro, tiny_lm, tiny_t5gemma

LLAMA = AttentionTraits(name="decoder", head_dim=128, dtype="bfloat16")
GEMMA_2 = dataclasses.replace(LLAMA, head_dim=256, softcap=50.0)
T5 = AttentionTraits(name="encoder", head_dim=64, dtype="bfloat16", causal=False, bias="distance")
TPU = Usage(platform="tpu", queries=512, keys=612)
GPU = dataclasses.replace(TPU, platform="gpu", compute_capability=9.0)


def chosen(asked: Any, traits: AttentionTraits, usage: Usage) -> Choice:
    return choose_attention(asked, traits, usage)


@pytest.mark.parametrize(
    ("traits", "usage", "implementation"),
    [
        (LLAMA, TPU, "pallas"),
        (GEMMA_2, TPU, "pallas"),
        (T5, TPU, "pallas"),
        (LLAMA, GPU, "cudnn"),
        (dataclasses.replace(LLAMA, head_dim=256), GPU, "cudnn"),
    ],
)
def test_a_kernel_is_chosen_where_it_is_asked_for_or_proven(
    traits: AttentionTraits, usage: Usage, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chosen("fused", traits, usage).implementation == implementation
    assert chosen("xla", traits, usage).implementation == "xla"
    unproven = chosen("auto", traits, usage)
    assert unproven.implementation == "xla"
    assert f"has not run on a {usage.platform.upper()} yet" in str(unproven)
    monkeypatch.setattr(attention_choice, "PROVEN", frozenset({usage.platform}))
    assert chosen("auto", traits, usage).implementation == implementation


@pytest.mark.parametrize(
    ("traits", "usage", "message"),
    [
        (LLAMA, dataclasses.replace(TPU, platform="cpu"), "this run uses cpu"),
        (dataclasses.replace(LLAMA, whole=False), TPU, "no kernel for the decoder of this family"),
        (dataclasses.replace(LLAMA, bias="alibi"), GPU, "ALiBi"),
        (T5, dataclasses.replace(TPU, trains_weights=True), "is for frozen weights"),
        (LLAMA, dataclasses.replace(TPU, queries=63), "reads at most 63"),
        (LLAMA, dataclasses.replace(TPU, keys=2049), "up to 2,048 positions with heads of 128"),
        (LLAMA, dataclasses.replace(TPU, keys=1025, dropout=True), "bfloat16 and dropout, and"),
        (
            dataclasses.replace(GEMMA_2, dtype="float32"),
            dataclasses.replace(TPU, keys=513),
            "up to 512 positions with heads of 256 in float32, and the decoder reads up to 513",
        ),
        (GEMMA_2, dataclasses.replace(TPU, keys=1025), "up to 1,024 positions with heads of 256"),
        (T5, dataclasses.replace(TPU, keys=1025), "up to 1,024 positions with heads of 64"),
        (T5, GPU, "gradient as large as the scores"),
        (dataclasses.replace(LLAMA, causal=False), GPU, "sees both directions"),
        (GEMMA_2, GPU, "no softcap"),
        (dataclasses.replace(LLAMA, dtype="float32"), GPU, "model.dtype is float32"),
        (dataclasses.replace(LLAMA, head_dim=100), GPU, "multiple of 8 up to 256"),
        (
            dataclasses.replace(LLAMA, head_dim=256),
            dataclasses.replace(GPU, compute_capability=8.0),
            "up to 128 numbers",
        ),
        (LLAMA, dataclasses.replace(GPU, dropout=True), "model.dropout_rate=0"),
    ],
)
def test_where_there_is_no_kernel_it_is_said_why(
    traits: AttentionTraits, usage: Usage, message: str
) -> None:
    plain = chosen("auto", traits, usage)
    assert plain.implementation == "xla"
    assert message in plain.reason
    with pytest.raises(UserError, match=r"model\.attention=fused: .*; set model\.attention=auto"):
        chosen("fused", traits, usage)


def test_an_experiment_on_a_cpu_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="for TPUs and GPUs, and this run uses cpu"):
        build_model(Experiment(model=Model(attention="fused")))


def test_families_say_what_decides() -> None:
    gemma = tiny_lm.make_lm("gemma").attention_traits
    assert (gemma.name, gemma.head_dim, gemma.softcap, gemma.causal) == ("decoder", 4, 2.0, True)
    assert tiny_lm.make_lm("bloom").attention_traits.bias == "alibi"
    assert micro.make_t5().attention_traits.bias == "distance"
    t5gemma = tiny_t5gemma.make_t5gemma(tiny_t5gemma.CONFIGS["t5gemma2"]).attention_traits
    assert (t5gemma.name, t5gemma.causal, t5gemma.whole) == ("encoder", False, True)


def test_an_experiment_says_how_much_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Usage] = []

    def noted(asked: Any, traits: AttentionTraits, usage: Usage) -> Choice:
        seen.append(usage)
        return attention_choice.PLAIN

    monkeypatch.setattr("prompt_tuning_jax.inference.setup.choose_attention", noted)
    experiment = Experiment(method=PromptTuning(length=7), data=Data(inputs_length=20))
    partitioner = partitioner_of(experiment)
    attention_for(experiment, tiny_lm.make_lm(), partitioner)
    full = dataclasses.replace(experiment, method=FullTuning())
    attention_for(full, micro.make_t5(), partitioner)
    causal, t5 = seen
    assert (causal.queries, causal.keys, causal.trains_weights) == (20, 27, False)
    assert (t5.queries, t5.keys, t5.trains_weights) == (20, 20, True)
