"""Recyclers find what is there to be found between two tables of embeddings."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.analysis import recycling
from prompt_tuning_jax.analysis.recycling import BY, By, Fit, as_combinations, fit_recycler
from prompt_tuning_jax.checkpoints.load import ModelCheckpoint
from prompt_tuning_jax.checkpoints.parameters import EMBEDDING
from prompt_tuning_jax.checkpoints.prompt_file import (
    PromptMetadata,
    StoredPrompt,
    load_prompt_with_metadata,
)
from prompt_tuning_jax.errors import UserError
from tests.micro import normal
from tests.tiny_lm import make_lm
from tests.tiny_t5gemma import make_t5gemma

SOURCE = normal(200, 16, seed=3).astype(np.float64)
PROMPT = normal(4, 16, seed=4, scale=3).astype(np.float64)
FITS = {by: Fit(by=by, terms=16, steps=20) for by in BY}


def turn(size: int = 16, seed: int = 5) -> np.ndarray:
    return np.linalg.qr(normal(size, size, seed=seed).astype(np.float64))[0]


@pytest.mark.parametrize("by", BY)
def test_the_same_model_gives_the_prompt_back(by: By) -> None:
    fitted = fit_recycler(SOURCE, SOURCE, FITS[by])
    np.testing.assert_allclose(fitted.recycle(PROMPT), PROMPT, atol=1e-6)
    assert fitted.error < 1e-6 and fitted.held_out_error < 1e-6 and fitted.pieces == 200


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("width", [16, 24, 9])
def test_a_linear_change_is_found(by: By, width: int) -> None:
    """A rotation, and maps into wider and narrower models."""
    change = turn() if width == 16 else normal(16, width, seed=6).astype(np.float64)
    fitted = fit_recycler(SOURCE, SOURCE @ change, FITS[by])
    assert fitted.recycle(PROMPT).shape == (4, width)
    np.testing.assert_allclose(fitted.recycle(PROMPT), PROMPT @ change, atol=1e-5)
    assert fitted.held_out_error < 1e-6


def test_combinations_are_exact_where_the_prompt_is_one() -> None:
    """And where no map would do: the target's embeddings have nothing to do with the source's."""
    target = normal(200, 24, seed=7).astype(np.float64)
    few = np.zeros((4, 200))
    for row, pieces in zip(few, ([3, 50], [7], [199, 0, 101], [20, 21]), strict=True):
        row[pieces] = [2.0, -3.0, 1.5][: len(pieces)]
    combine = fit_recycler(SOURCE, target, Fit(by="combination", terms=16)).recycle
    np.testing.assert_allclose(combine(few @ SOURCE), few @ target, atol=1e-9)
    linear = fit_recycler(SOURCE, target, Fit()).recycle
    assert np.abs(linear(few @ SOURCE) - few @ target).max() > 1


def test_what_a_combination_is() -> None:
    """No more terms than asked for, none twice, each makes it better, as many as the width do."""
    missed = []
    for terms in (1, 2, 4, 8, 16, 30):
        weights = as_combinations(PROMPT, SOURCE, terms=terms)
        assert (np.count_nonzero(weights, axis=1) == min(terms, 16)).all()
        missed.append(np.linalg.norm(weights @ SOURCE - PROMPT, axis=1))
    assert all((a > b).all() for a, b in itertools.pairwise(missed[:5]))
    assert missed[4].max() < 1e-9 and missed[5].max() < 1e-9
    # The first taken is the one that points most along, whatever its length.
    cosines = np.abs(PROMPT @ SOURCE.T) / np.linalg.norm(SOURCE, axis=1)
    first = as_combinations(PROMPT, SOURCE, terms=1)
    np.testing.assert_array_equal(np.argmax(np.abs(first), axis=1), np.argmax(cosines, axis=1))
    assert not as_combinations(np.zeros((1, 16)), SOURCE, terms=4).any()
    twice = np.concatenate([SOURCE[:5], SOURCE[:5], np.zeros((1, 16))])
    assert np.count_nonzero(as_combinations(PROMPT[:1], twice, terms=16)) == 5
    together = as_combinations(PROMPT, SOURCE, terms=3)
    for row, vector in zip(together, PROMPT, strict=True):
        alone = as_combinations(vector[None], SOURCE, terms=3)[0]
        np.testing.assert_allclose(row, alone, atol=1e-12)


def test_the_smallest_dense_combination_is_the_linear_map() -> None:
    """Hence combinations of few pieces: those of all would be the same as ``linear``."""
    target = normal(200, 24, seed=7).astype(np.float64)
    dense = np.linalg.pinv(SOURCE.T) @ PROMPT.T
    linear = fit_recycler(SOURCE, target, Fit()).recycle
    np.testing.assert_allclose(dense.T @ target, linear(PROMPT), atol=1e-9)


def test_fewer_pieces_than_dimensions() -> None:
    """The map of least squares that is smallest: along what no piece shows, nothing."""
    source, target = normal(24, 40).astype(np.float64), normal(24, 10, seed=1).astype(np.float64)
    fitted = fit_recycler(source, target)
    np.testing.assert_allclose(
        fitted.recycle(PROMPT[:, :1] * np.ones(40)),
        ((PROMPT[:, :1] * np.ones(40)) @ np.linalg.pinv(source) @ target),
        atol=1e-9,
    )
    assert fitted.error < 1e-9 < 0.5 < fitted.held_out_error


def test_the_mlp_learns_what_no_map_does_and_by_its_seed() -> None:
    target = SOURCE @ turn() + 0.5 * np.abs(SOURCE @ turn(seed=8))
    linear = fit_recycler(SOURCE, target)
    fit = Fit(by="mlp", steps=150, batch_size=64)
    mlp = fit_recycler(SOURCE, target, fit)
    assert mlp.error < 0.6 * linear.error
    again = fit_recycler(SOURCE, target, fit)
    np.testing.assert_array_equal(mlp.recycle(PROMPT), again.recycle(PROMPT))
    other = fit_recycler(SOURCE, target, Fit(by="mlp", steps=150, batch_size=64, seed=1))
    assert np.abs(mlp.recycle(PROMPT) - other.recycle(PROMPT)).max() > 1e-4


def test_errors_are_relative_and_held_out_ones_honest() -> None:
    noise = normal(200, 16, seed=9)
    target = SOURCE @ turn() + 0.1 * noise
    fitted = fit_recycler(SOURCE, target)
    assert 0.05 < fitted.error < 0.105 < fitted.held_out_error * 1.05 < 0.2
    assert fit_recycler(SOURCE, 50 * target).error == pytest.approx(fitted.error)


def test_refusals() -> None:
    with pytest.raises(UserError, match="too few"):
        fit_recycler(SOURCE[:19], SOURCE[:19])
    with pytest.raises(UserError, match="so they differ"):
        fit_recycler(SOURCE, SOURCE[:50])


def opened(table_VD: np.ndarray, **config: Any) -> ModelCheckpoint:
    """A checkpoint of which only the embeddings are read."""
    vocab_size, embed_dim = table_VD.shape
    of = SimpleNamespace(vocab_size=vocab_size, embed_dim=embed_dim, **config)
    params = {EMBEDDING: SimpleNamespace(whole=lambda: table_VD)}
    return cast(Any, SimpleNamespace(config=of, params=params, vocabulary=lambda: None))


@pytest.mark.parametrize(
    "make", [make_lm, lambda: make_lm("gemma"), lambda: make_t5gemma("t5gemma")]
)
def test_embeddings_are_in_the_space_of_prompts(make: Any) -> None:
    model = make()
    table_VD = np.asarray(param_tree.split(model)[1][EMBEDDING])
    scale = getattr(model.config, "embedding_scale", 1.0)
    found = recycling.embeddings(opened(table_VD, embedding_scale=scale))
    wanted = model.embedding_table()[np.arange(len(table_VD))]
    np.testing.assert_allclose(found, np.asarray(wanted), rtol=1e-6)


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("kind", ["safetensors", "PEFT adapter"])
def test_models_that_scale_their_embeddings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, by: By, kind: Any
) -> None:
    """A prompt of tokens stays one of the same tokens, whatever the factors of the models are."""
    target_VE = (SOURCE @ normal(16, 24, seed=6)).astype(np.float32)
    models = {
        "a": opened(SOURCE, embedding_scale=4.0, peft_prompt_scale=4.0, model_type="t5gemma"),
        "b": opened(target_VE, embedding_scale=5.0, model_type="gemma3_text"),
    }
    tokens = [7, 50, 120]
    prompt_PD = SOURCE[tokens] if kind == "PEFT adapter" else 4 * SOURCE[tokens]
    about = PromptMetadata(model_name="a", model_type="t5gemma", embedding_scale=4.0)
    stored = StoredPrompt(prompt_PD=prompt_PD.astype(np.float32), metadata=about, source=kind)
    monkeypatch.setattr(recycling, "open_source", models.__getitem__)
    monkeypatch.setattr(recycling, "fingerprint_of", lambda model: "f" * 16)
    monkeypatch.setattr(recycling, "read_all", lambda paths: {paths[0]: stored})
    output = tmp_path / "q.safetensors"
    recycling.recycle("p", source="a", target="b", output=output, fit=FITS[by])
    found_PE, metadata = load_prompt_with_metadata(output)
    np.testing.assert_allclose(found_PE, 5 * target_VE[tokens], atol=2e-3)
    assert (metadata.model_type, metadata.embedding_scale) == ("gemma3_text", 5.0)
