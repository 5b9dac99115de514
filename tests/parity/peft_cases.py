"""PEFT's recorded adapters of decoder-only models, for the tests that read them."""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prompt_tuning_jax.checkpoints.load import load_model
from prompt_tuning_jax.inference import api
from prompt_tuning_jax.methods import TunedModel
from prompt_tuning_jax.models.base import Model

MODELS = ("llama_gqa_tied", "gpt2", "bloom", "gemma2", "qwen3")


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


def padded(rows: list[list[int]], width: int, fill: int) -> np.ndarray:
    array = np.full((len(rows), width), fill, np.int32)
    for row, ids in zip(array, rows, strict=True):
        row[: len(ids)] = ids
    return array


def mostly_slow(pairs: Iterable[tuple[str, str]], always: set[tuple[str, str]]) -> list[Any]:
    """Parameters of a test of which only some are tried in a short run."""
    slow = pytest.mark.slow
    return [pytest.param(*pair, marks=[] if pair in always else [slow]) for pair in pairs]
