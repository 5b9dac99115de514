"""Prefixes, P-tuning and multitask prompts of PEFT give its logits here, and ours do there."""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.hf.pretrained import write_hf
from prompt_tuning_jax.checkpoints.load import load_model
from prompt_tuning_jax.checkpoints.peft.prompts import read_peft_prompts, write_peft_prompts
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods import (
    Context,
    DeepPrompts,
    MethodConfig,
    MultitaskPrompts,
    PrefixTuning,
    PromptTuning,
    TunedModel,
    attach_method,
)
from prompt_tuning_jax.methods.p_tuning import BothWays, LstmEncoder, MlpEncoder
from prompt_tuning_jax.models.t5.config import T5Config
from prompt_tuning_jax.models.t5.model import T5
from tests.micro import make_t5, normal, shifted, token_rows
from tests.parity.test_peft_prompts import in_peft, libraries

__all__ = ["libraries"]  # a fixture

KINDS = [
    "prefix",
    "prefix_proj",
    "ptuning_mlp_sub1",
    "ptuning_mlp_sub2",
    "ptuning_lstm_sub1",
    "ptuning_lstm_sub2",
    "multitask_sub1",
    "multitask_sub2",
]
# Heads as wide as the model, without which PEFT has no prefixes, and an odd number of layers.
SQUARE = T5Config(
    vocab_size=64,
    embed_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    num_encoder_layers=3,
    num_decoder_layers=3,
)
MULTITASK = MultitaskPrompts(length=4, rank=2, tasks=3, init="uniform")
PREFIX = PrefixTuning(length=4, encoder=False, cross=False, before=True, init="uniform")


@pytest.fixture(scope="module")
def hf(shared: Path) -> Path:
    return shared / "fixtures/hf"


@functools.cache
def load(folder: Path) -> T5:
    return load_model(str(folder))


def attached_with(model: T5, method: MethodConfig, trainable: Any) -> TunedModel:
    fresh = attach_method(model, method, key=jax.random.key(0), context=Context())
    graphdef, params = param_tree.split(fresh)
    own = {name: p for name, p in params.items() if method.trains(name)}
    param_tree.require_same_shapes(trainable, own, of="what is read", and_of="the method")
    arrays = {name: jnp.asarray(array) for name, array in trainable.items()}
    merged: TunedModel = param_tree.merge(graphdef, {**params, **arrays})
    return merged


def logits(attached: TunedModel, source: Any, target: Any, task_B: Any = None) -> np.ndarray:
    """The logits of these targets."""
    graphdef, params = param_tree.split(attached)

    def run(params: Any) -> jax.Array:
        made: jax.Array = param_tree.merge(graphdef, params)(source, target, task_B=task_B)
        return made

    return np.asarray(jax.jit(run)(params))


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_peft_give_the_recorded_logits(hf: Path, tmp_path: Path, kind: str) -> None:
    folder = hf / "peft/b_t5_11" / kind
    want, inputs = np.load(folder / "cases.npz"), np.load(hf / "b_t5_11/cases.npz")
    model = load(hf / "b_t5_11")
    tasks = want["task_ids"].astype(np.int32) if "task_ids" in want.files else None
    read = read_peft_prompts(folder, model.config)
    assert read.base_model_name_or_path == "b_t5_11" and read.peft_version
    write_peft_prompts(
        tmp_path / "ours",
        read.method,
        read.trainable,
        config=model.config,
        base_model_name_or_path="b_t5_11",
    )
    again = read_peft_prompts(tmp_path / "ours", model.config)
    assert again.method == read.method and again.trainable.keys() == read.trainable.keys()
    for name, array in read.trainable.items():
        np.testing.assert_array_equal(again.trainable[name], array)
    source = inputs["input_ids"] * inputs["attention_mask"]
    real = inputs["labels"] != -100
    got = logits(
        attached_with(model, again.method, again.trainable),
        source,
        np.where(real, inputs["labels"], 0),
        tasks,
    )
    # Those of a prompt in the decoder come first.
    behind_prompt = want["logits"][:, -got.shape[1] :]
    np.testing.assert_allclose(got[real], behind_prompt[real], atol=2e-4)


def test_the_encoders_of_p_tuning_are_pefts(hf: Path) -> None:
    def fill(dense: Any, weights: Any, name: str) -> None:
        dense.kernel_IO.set_value(weights[f"{name}.weight"].T)
        dense.bias_O.set_value(weights[f"{name}.bias"])

    def fill_lstm(both: BothWays, weights: Any, layer: int) -> None:
        for end, lstm in (("", both.forward), ("_reverse", both.backward)):
            lstm.input_IG.set_value(weights[f"lstm_head.weight_ih_l{layer}{end}"].T)
            lstm.hidden_MG.set_value(weights[f"lstm_head.weight_hh_l{layer}{end}"].T)
            lstm.input_bias_G.set_value(weights[f"lstm_head.bias_ih_l{layer}{end}"])
            lstm.hidden_bias_G.set_value(weights[f"lstm_head.bias_hh_l{layer}{end}"])

    for kind in ("ptuning_mlp_sub1", "ptuning_lstm_sub2"):
        folder = hf / "peft/b_t5_11" / kind
        weights = load_file(folder / "prompt_encoder_full.safetensors")
        encoder: Any
        if "mlp" in kind:
            encoder = MlpEncoder(48, 24, key=jax.random.key(0))
            for number, part in zip((0, 2, 4), ("first", "second", "third"), strict=True):
                fill(getattr(encoder, part), weights, f"mlp_head.{number}")
        else:
            encoder = LstmEncoder(48, 24, dropout_rate=0.0, key=jax.random.key(0))
            fill_lstm(encoder.lower, weights, 0)
            fill_lstm(encoder.upper, weights, 1)
            fill(encoder.inner, weights, "mlp_head.0")
            fill(encoder.outer, weights, "mlp_head.2")
        got = jax.jit(encoder)(weights["embedding.weight"])
        want = np.load(folder / "cases.npz")["encoded_prompt"]
        np.testing.assert_allclose(got, want, atol=2e-5)


def random_prefix(layers: int) -> dict[str, np.ndarray]:
    names = ("method/decoder/key_LPHK", "method/decoder/value_LPHK")
    return {name: normal(layers, 4, 2, 8, seed=seed) for seed, name in enumerate(names)}


def random_multitask(rows: int = 4) -> dict[str, np.ndarray]:
    shapes = {"shared_PD": (rows, 16), "cols_NPR": (3, rows, 2), "rows_NRD": (3, 2, 16)}
    return {f"method/{name}": normal(*shape, seed=1) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("method", "trainable", "tasks"),
    [
        (PREFIX, random_prefix(3), None),
        (PromptTuning(length=4, init="uniform"), {"method/prompt_PD": normal(4, 16)}, None),
        (MULTITASK, random_multitask(), [2, 0]),
        (replace(MULTITASK, decoder_length=4), random_multitask(8), [2, 0]),
    ],
    ids=["prefix", "p_tuning", "multitask", "multitask in the decoder"],
)
def test_what_is_written_gives_the_same_logits_in_peft(
    libraries: Any, tmp_path: Path, method: MethodConfig, trainable: Any, tasks: Any
) -> None:
    model = make_t5(SQUARE)
    write_hf(tmp_path / "m", SQUARE, param_tree.split(model)[1], dtype="float32")
    write_peft_prompts(
        tmp_path / "a",
        method,
        trainable,
        config=SQUARE,
        base_model_name_or_path=str(tmp_path / "m"),
    )
    source, targets = token_rows([5, 3], 7), token_rows([4, 6], 6, seed=1)
    inputs = {"input_ids": source, "attention_mask": source != 0}
    if tasks is None:
        inputs["decoder_input_ids"] = shifted(targets)
    else:  # PEFT takes no decoder inputs then, and makes them of the labels
        tasks = np.asarray(tasks, np.int32)
        inputs |= {"labels": targets, "task_ids": tasks}
    there = in_peft(libraries, tmp_path / "m", tmp_path / "a", inputs)
    here = logits(attached_with(model, method, trainable), source, targets, tasks)
    np.testing.assert_allclose(here, there[:, -here.shape[1] :], atol=2e-4)


def test_what_peft_does_not_have_is_refused(hf: Path, tmp_path: Path) -> None:
    model = load(hf / "b_t5_11")
    with pytest.raises(UserError, match=r"peft_type is .LORA.; supported: PREFIX_TUNING, P_TUNING"):
        read_peft_prompts(hf / "peft/b_t5_11/lora_qv_r4", model.config)
    with pytest.raises(UserError, match="token_dim is 48, but the width of this model is 16"):
        read_peft_prompts(hf / "peft/b_t5_11/prefix", SQUARE)

    two = T5Config(**{**vars(SQUARE), "num_encoder_layers": 2, "num_decoder_layers": 2})
    for method, trainable, config, message in [
        (PrefixTuning(length=4), random_prefix(3), SQUARE, "method.cross=false"),
        (PREFIX, random_prefix(2), two, "same prefix for decoder layers 0 and 1"),
        (MultitaskPrompts(combine="sum"), {}, SQUARE, "method.combine=sum"),
        (replace(MULTITASK, decoder_length=3), {}, SQUARE, "method.decoder_length is 3"),
        (PromptTuning(placement="before_eos"), {}, SQUARE, "method.placement=before_eos"),
        (DeepPrompts(), {}, SQUARE, "no adapter for deep_prompts"),
    ]:
        with pytest.raises(UserError, match=message):
            write_peft_prompts(
                tmp_path / "a", method, trainable, config=config, base_model_name_or_path="m"
            )
    assert not (tmp_path / "a").exists()


def test_a_damaged_adapter_is_reported(tmp_path: Path) -> None:
    method = MultitaskPrompts(length=4, rank=2, tasks=3)
    folder = tmp_path / "a"
    trainable = random_multitask()
    write_peft_prompts(folder, method, trainable, config=SQUARE, base_model_name_or_path="m")
    config = json.loads((folder / "adapter_config.json").read_text())
    for changes, message in [
        ({"num_tasks": 4}, r"prefix_task_cols is \[3, 4, 2\].* \[4, 4, 2\]"),
        ({"num_ranks": 0}, "num_ranks is 0"),
        ({"num_transformer_submodules": 3}, "num_transformer_submodules is 3"),
        ({"task_type": "CAUSAL_LM"}, "task_type"),
        ({"peft_type": "P_TUNING"}, "only in .*prefix_task_cols"),
    ]:
        text = json.dumps({**config, **changes})
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            read_peft_prompts(folder, SQUARE)
