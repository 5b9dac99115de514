"""Vision transformers against recorded numbers of transformers, and VPT's of Jia et al. 2022."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.hf.pretrained import read_hf, write_hf
from prompt_tuning_jax.checkpoints.load import load_model
from prompt_tuning_jax.methods import (
    Context,
    DeepPrompts,
    MethodConfig,
    PromptTuning,
    attach_method,
)
from prompt_tuning_jax.models.base import Model

CLASSIFIER = ("model/classifier/kernel", "model/classifier/bias")


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    return shared / "fixtures" / "families" / "vit"


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(str(folder))


def pixels(cases: Mapping[str, Any]) -> np.ndarray:
    """Images as the model has them: channels last."""
    return np.asarray(cases["pixel_values"]).transpose(0, 2, 3, 1)


def test_embeddings_hidden_states_and_logits(model: Model, folder: Path) -> None:
    cases = np.load(folder / "cases.npz")

    @jax.jit
    def run(images: Any) -> Any:
        source = model.embed(images)
        context = model.read(source)
        return source.embeddings_BUD, context.hidden_BUD, model.write(context, images[:, :1, 0, 0])

    embeddings_BUD, hidden_BUD, logits_B1C = run(pixels(cases))
    np.testing.assert_allclose(embeddings_BUD, cases["embeddings"], atol=2e-4)
    np.testing.assert_allclose(hidden_BUD, cases["last_hidden_state"], atol=2e-4)
    np.testing.assert_allclose(logits_B1C[:, 0], cases["logits"], atol=2e-4)


@pytest.mark.parametrize("kind", ["shallow", "deep"])
def test_visual_prompts_and_their_gradients(model: Model, folder: Path, kind: str) -> None:
    cases = np.load(folder / "vpt_cases.npz")
    shallow_PD, deep_LPD = cases["shallow_prompts"], cases["deep_prompts"]
    method: MethodConfig = PromptTuning(length=5, init="xavier_uniform")
    arrays = {"method/prompt_PD": shallow_PD}
    if kind == "deep":
        method = DeepPrompts(length=5, init="xavier_uniform")
        arrays = {"method/vectors/prompts_PD": np.concatenate([shallow_PD, *deep_LPD])}
    arrays |= dict(zip(CLASSIFIER, (cases["head_weight"].T, cases["head_bias"]), strict=True))
    context = Context(labels=tuple("abcdef"))
    attached = attach_method(model, method, key=jax.random.key(0), context=context)
    graphdef, params = param_tree.split(attached)
    assert {name for name in params if method.trains(name)} == arrays.keys()
    images, targets_B1 = pixels(cases), cases["labels"][:, None]

    @jax.jit
    @jax.value_and_grad
    def loss(own: Any) -> Any:
        tuned = param_tree.merge(graphdef, {**params, **own})
        sums = tuned.token_sums(images, targets_B1)
        return sums.loss / sums.tokens

    value, gradients = loss({name: jnp.asarray(array) for name, array in arrays.items()})
    tuned = param_tree.merge(graphdef, {**params, **arrays})
    context, injections = tuned.read(images)
    logits_B1C = tuned.model.write(context, targets_B1, injections=injections)
    np.testing.assert_allclose(context.hidden_BUD, cases[f"{kind}_last_hidden_state"], atol=2e-4)
    np.testing.assert_allclose(logits_B1C[:, 0], cases[f"{kind}_logits"], atol=2e-4)
    np.testing.assert_allclose(value, cases[f"{kind}_loss"], atol=2e-4)
    kernel, bias = (gradients.pop(name) for name in CLASSIFIER)
    np.testing.assert_allclose(kernel.T, cases[f"{kind}_grad_head_weight"], atol=2e-4)
    np.testing.assert_allclose(bias, cases[f"{kind}_grad_head_bias"], atol=2e-4)
    want = [cases[f"{kind}_grad_shallow_prompts"]]
    want += [*cases["deep_grad_deep_prompts"]] if kind == "deep" else []
    (prompts,) = gradients.values()
    np.testing.assert_allclose(prompts, np.concatenate(want), atol=2e-4)


def test_prompts_start_within_the_papers_bound(model: Model, folder: Path) -> None:
    bound = float(np.load(folder / "vpt_cases.npz")["official_init_bound"])
    method = PromptTuning(length=50, init="xavier_uniform")
    attached = attach_method(
        model, method, key=jax.random.key(0), context=Context(labels=("a", "b"))
    )
    largest = float(np.abs(attached.method.prompt_PD.get_value()).max())
    assert 0.95 * bound < largest <= bound


def test_a_folder_is_written_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    config, params, vocabulary = read_hf(folder)
    assert vocabulary is None
    write_hf(tmp_path / "out", config, params, dtype="stored")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert array.shape == after[name].shape and array.tobytes() == after[name].tobytes(), name
    assert read_hf(tmp_path / "out")[0] == config
    v5 = tmp_path / "v5"
    v5.mkdir()
    (v5 / "model.safetensors").symlink_to(folder / "model.safetensors")
    (v5 / "config.json").write_bytes((folder / "config.v5.json").read_bytes())
    assert read_hf(v5)[0] == config
