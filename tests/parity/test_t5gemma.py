"""T5Gemma and T5Gemma 2 against numbers recorded from transformers, in float32."""

import functools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.load import load_model
from prompt_tuning_jax.inference.api import generate, score
from prompt_tuning_jax.models.base import Model

# transformers 5's T5Gemma has one more position in the encoder's windows than version 4, DeepMind's
# implementation, and this one: with a window of one more, the numbers are version 5's.
RECORDED = {
    "t5gemma": ("t5gemma", "cases_v4.57.1", 0),
    "t5gemma of transformers 5": ("t5gemma", "cases", 1),
    "t5gemma_unbalanced": ("t5gemma_unbalanced", "cases_v4.57.1", 0),
    "t5gemma_unbalanced of transformers 5": ("t5gemma_unbalanced", "cases", 1),
    "t5gemma2": ("t5gemma2_text", "cases", 0),
}
WITH_TEXTS = ["t5gemma_unbalanced of transformers 5", "t5gemma2"]


@pytest.fixture(scope="module")
def opened(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A recorded model and its numbers, by their name in ``RECORDED``."""

    @functools.cache
    def read(name: str) -> tuple[Model, Mapping[str, np.ndarray]]:
        folder, cases, more = RECORDED[name]
        source = shared / "fixtures/families" / folder
        want = dict(np.load(source / "cases.npz")) | dict(np.load(source / f"{cases}.npz"))
        copy = tmp_path_factory.mktemp("model")
        for file in ("config.json", "generation_config.json", "model.safetensors"):
            shutil.copyfile(source / file, copy / file)
        raw = json.loads((copy / "config.json").read_text())
        if more:
            raw["encoder"]["sliding_window"] += more
        (copy / "config.json").write_text(json.dumps(raw))
        return load_model(str(copy)), want

    return read


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef: Any, params: Any, inputs: Any, targets: Any) -> Any:
    model: Model = param_tree.merge(graphdef, params)
    context = model.read(model.embed(inputs))
    return context.hidden_BUD, model.write(context, targets)


@pytest.mark.parametrize("name", RECORDED)
def test_hidden_states_and_logits_are_those_recorded(opened: Any, name: str) -> None:
    model, want = opened(name)
    for prefix in ("", "long_"):
        labels = want[f"{prefix}labels"]
        inputs, targets = want[f"{prefix}input_ids"], np.where(labels < 0, 0, labels)
        hidden, logits = _run(*param_tree.split(model), inputs, targets)
        real = inputs != 0
        encoded = want[f"{prefix}encoder_last_hidden_state"]
        np.testing.assert_allclose(hidden[real], encoded[real], atol=2e-4)
        np.testing.assert_allclose(
            logits[labels >= 0], want[f"{prefix}logits"][labels >= 0], atol=2e-4
        )
    if "eoi_input_ids" in want:
        hidden, _ = _run(*param_tree.split(model), want["eoi_input_ids"], targets[:1])
        np.testing.assert_allclose(hidden, want["eoi_encoder_last_hidden_state"], atol=2e-4)


@pytest.mark.parametrize("name", WITH_TEXTS)
def test_it_writes_and_scores_as_recorded(opened: Any, name: str) -> None:
    model, want = opened(name)
    inputs = [row[row != 0].tolist() for row in want["input_ids"]]
    targets = [row[row >= 0].tolist() for row in want["labels"]]
    scores = score(model, inputs, targets)
    np.testing.assert_allclose(scores, want["row_logprob_sum"], atol=1e-3)
    greedy = generate(model, inputs, max_length=8)
    np.testing.assert_array_equal(greedy.ids, want["greedy_ids"])
    beams = generate(
        model, inputs, None, "beam",
        max_length=8, num_beams=3, length_penalty=1.0, beam_rule="hf",
    )  # fmt: skip
    np.testing.assert_array_equal(beams.ids, want["beam_lp10_ids"])
    np.testing.assert_allclose(beams.scores, want["beam_lp10_scores"], atol=1e-3)
