"""Adapters of decoder-only models give PEFT's recorded numbers, and are written bit for bit."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.load import load_model
from prompt_tuning_jax.checkpoints.peft.adapter_file import CONFIG, WEIGHTS
from prompt_tuning_jax.config.experiment import Optimizer
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference import api
from prompt_tuning_jax.inference.conversion import convert
from prompt_tuning_jax.inference.loading import attach
from prompt_tuning_jax.methods import TunedModel
from prompt_tuning_jax.methods.prompt import with_prompt
from prompt_tuning_jax.models.base import Model

MODELS = ("llama_gqa_tied", "gpt2", "bloom", "gemma2", "qwen3")
PROMPTS = ("prompt", "ptuning_mlp", "ptuning_lstm", "cpt")
PREFIXES = ("prefix", "prefix_proj", "cartridge")
AROUND_LAYERS = ("lora_qv", "lora_all_rslora", "ia3")
ADAPTERS = (*PROMPTS, *PREFIXES, *AROUND_LAYERS)
METHODS = {"prompt": "Prompt", "prefix": "Prefixes", "lora_qv": "LoRAModule", "ia3": "IA3Module"}


@pytest.fixture(scope="module")
def families(shared: Path) -> Path:
    return shared / "fixtures/families"


@functools.cache
def model_of(folder: Path) -> Model:
    loaded: Model = load_model(str(folder))
    return loaded


class Case:
    """A recorded adapter: its rows as lists of token ids, and PEFT's numbers."""

    def __init__(self, families: Path, model: str, adapter: str):
        self.folder = families / "peft" / model / adapter
        self.model = model_of(families / model)
        self.want = np.load(self.folder / "cases.npz")
        lengths = self.want["attention_mask"].sum(axis=1)
        ids = self.want["input_ids"]
        self.rows = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
        first = (self.want["labels"] != -100).argmax(axis=1)
        self.inputs = [row[:n] for row, n in zip(self.rows, first, strict=True)]
        self.targets = [row[n:] for row, n in zip(self.rows, first, strict=True)]

    def require_logits(self, attached: TunedModel, rows: slice = slice(None)) -> None:
        got = api.logits(attached, self.rows)
        for number in range(len(self.rows))[rows]:
            length = len(self.rows[number])
            want = self.want["logits"][number, :length]
            np.testing.assert_allclose(got[number, :length], want, atol=2e-4)

    def require_scores(self, attached: TunedModel) -> None:
        got = api.score(attached, self.inputs, self.targets)
        np.testing.assert_allclose(got, self.want["row_logprob_sum"], atol=1e-3)
        loss = -got.sum() / sum(map(len, self.targets))
        np.testing.assert_allclose(loss, self.want["loss"], atol=2e-4)

    def require_greedy(self, attached: TunedModel) -> None:
        got = api.generate(attached, self.rows, max_length=8).ids
        for row, ids, length in zip(
            got, self.want["greedy_ids"], self.want["greedy_len"], strict=True
        ):
            assert row[:length].tolist() == ids[:length].tolist()


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", MODELS)
def test_adapters_give_the_recorded_logits(families: Path, name: str, adapter: str) -> None:
    case = Case(families, name, adapter)
    attached = attach(case.model, case.folder)
    assert type(attached.method).__name__ == METHODS.get(adapter, type(attached.method).__name__)
    case.require_logits(attached)
    bare = api.logits(case.model, case.rows)
    assert np.abs(bare[0, :4] - case.want["logits"][0, :4]).max() > 0.03  # the adapter matters


@pytest.mark.parametrize("name", MODELS)
def test_each_row_gets_the_prompt_of_its_task(families: Path, name: str) -> None:
    case = Case(families, name, "multitask")
    for number, task in enumerate(case.want["task_ids"]):
        attached = attach(case.model, case.folder, task=str(task))
        case.require_logits(attached, slice(number, number + 1))


@pytest.mark.parametrize("adapter", ["prompt", "cartridge", "lora_qv", "ia3"])
@pytest.mark.parametrize("name", MODELS)
def test_targets_are_scored_and_text_generated_as_recorded(
    families: Path, name: str, adapter: str
) -> None:
    case = Case(families, name, adapter)
    attached = attach(case.model, case.folder)
    case.require_scores(attached)
    case.require_greedy(attached)
