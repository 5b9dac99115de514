"""What analyses say about prompts whose words, copies and effects are known."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.analysis.positions import leave_one_out, redundancy
from prompt_tuning_jax.analysis.prompts import Start, analyze
from prompt_tuning_jax.analysis.report import write_report
from prompt_tuning_jax.analysis.words import embedding_rows, nearest_tokens, nearest_words, ranks_of
from prompt_tuning_jax.checkpoints.hf.pretrained import write_hf
from prompt_tuning_jax.checkpoints.load import load_model
from prompt_tuning_jax.checkpoints.prompt_file import load_prompt, save_prompt
from prompt_tuning_jax.cli.main import main
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.evaluation import evaluate
from prompt_tuning_jax.inference.setup import vocabulary_of
from prompt_tuning_jax.training.run import train
from tests import tiny_lm, tiny_run
from tests.micro import normal
from tests.tiny_run import LABELS, LENGTH, experiment


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two prompts that start from labels and words, with a rate that keeps them there."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    changes: dict[str, Any] = {
        "training.seeds": (0, 1),
        "training.steps": 4,
        "training.eval_every": 2,
        "optimizer.learning_rate": 0.01,
    }
    train(experiment(folder, changes), quiet=True)
    return folder


def test_nearest_by_both_distances() -> None:
    """As a loop over the table; a long vector is near by direction, and far by distance."""
    table, prompt = normal(30, 8), normal(4, 8, seed=1)
    table[7] = 5 * prompt[0]
    for by in ("cosine", "euclidean"):
        ids, values = nearest_tokens(jnp.asarray(prompt), jnp.asarray(table), number=3, by=by)
        for row, own, value in zip(prompt, np.asarray(ids), np.asarray(values), strict=True):
            cosine = table @ row / np.linalg.norm(table, axis=1) / np.linalg.norm(row)
            distance = np.linalg.norm(table - row, axis=1)
            order = np.argsort(-cosine) if by == "cosine" else np.argsort(distance)
            assert own.tolist() == order[:3].tolist()
            expected = (cosine if by == "cosine" else distance)[order[:3]]
            np.testing.assert_allclose(value, expected, atol=1e-4)
    assert np.asarray(nearest_tokens(jnp.asarray(prompt), jnp.asarray(table), number=1)[0])[0] == 7


def test_clusters_are_closer_than_chance() -> None:
    """A group of equal embeddings is a cluster, lexical if they are forms of a word."""
    model = load_model(str(tiny_run.model_folder()))
    words = vocabulary_of(model)
    table = normal(words.size, 16, seed=2)
    forms = [words.encode(word)[0] for word in LABELS]
    table[forms] = 4 * normal(1, 16, seed=3) + 0.1 * normal(len(forms), 16, seed=4)
    prompt = np.stack([table[forms[0]], normal(1, 16, seed=9)[0]])
    found = nearest_words(prompt, jnp.asarray(table), words, number=3)
    assert {word for word, _ in found.words[0]} == set(LABELS)
    assert found.clusters[0] == "related" and found.tightness_P[0] > 0.9 > found.chance
    with pytest.raises(UserError, match="--top 1: give a number of words from 2"):
        nearest_words(prompt, jnp.asarray(table), words, number=1)


def test_a_start_that_stays_has_rank_one() -> None:
    table = normal(50, 8)
    start = table[[3, 4]]
    moved = np.stack([start[0] + 0.01 * normal(1, 8, seed=1)[0], -start[1]])
    assert ranks_of(moved, start, jnp.asarray(table)) == [1, 50]
    kept = Start(
        texts=("red", "", "word", "word"),
        are_labels=(True, True, False, False),
        ranks=(5, 1, 6, 1),
        norms_P=np.ones(4),
        moved_P=np.ones(4),
    )
    assert kept.kept(labels=True) == (1, 1) and kept.kept(labels=False) == (1, 2)


def test_redundancy_of_copies_and_of_axes() -> None:
    axes = redundancy(np.eye(4, 6))
    assert axes.mean == pytest.approx(0) and axes.copies == 0
    assert axes.effective_rank == pytest.approx(4)
    copies = redundancy(np.ones((4, 6)))
    assert copies.mean == pytest.approx(1) and copies.copies == 3
    assert copies.effective_rank == pytest.approx(1)
    assert redundancy(np.ones((1, 6))).mean is None


def test_a_run_is_analyzed(run: Path, tmp_path: Path) -> None:
    """Labels and words are kept, norms logged; effects are those of shorter prompts."""
    found = analyze([run], examples=24)
    assert [prompt.name for prompt in found.prompts] == ["seed_0", "seed_1"]
    prompt = found.prompts[0]
    assert prompt.start is not None and prompt.effects is not None
    assert prompt.start.texts[:3] == LABELS and prompt.start.kept(labels=True) == (3, 3)
    assert prompt.start.kept(labels=False) == (LENGTH - 3, LENGTH - 3)
    assert prompt.with_labels >= 3 and prompt.euclidean.words[0][0][0] == LABELS[0]
    assert [step for step, _ in prompt.norms] == [2, 4]
    array = load_prompt(run / "prompts/seed_0.safetensors")
    np.testing.assert_allclose(prompt.norms_P, np.linalg.norm(array, axis=1), rtol=1e-5)
    of = experiment(run)
    shorter = evaluate(of, prompts=[array, np.delete(array, 1, axis=0)])
    whole, without = (predictions for predictions in shorter.predictions.popitem()[1].texts_EN)
    changed = 100 * np.mean([a != b for a, b in zip(whole, without, strict=True)])
    assert prompt.effects.changed_P[1] == pytest.approx(changed)
    assert prompt.effects.scores_P[1] == shorter.per_prompt[1]["accuracy"]
    assert found.similarities["mean"][0, 0] == pytest.approx(1)

    files = write_report(found, tmp_path / "report")
    page = files[0].read_text()
    assert page.count("data:image/png;base64,") == len(files) - 2 == 6
    assert "http" not in page and "<script" not in page
    written = json.loads(files[1].read_text())
    assert written["prompts"][0]["labels_kept"] == [3, 3]
    assert math.isfinite(written["prompts"][1]["positions"][0]["left_out"]["loss_rise"])


def test_a_bare_file_needs_its_model(run: Path, tmp_path: Path, capsys: Any) -> None:
    """Without a run nothing says on what it was trained; a name cannot write into the page."""
    array = load_prompt(run / "prompts/seed_0.safetensors")
    file = tmp_path / "<b>.npy"
    save_prompt(file, array)
    output = tmp_path / "out"
    assert main(["analyze", str(file), "--output", str(output)]) == 2
    assert "give --model" in capsys.readouterr().err
    model = str(tiny_run.model_folder())
    assert main(["analyze", str(file), "--model", model, "--output", str(output)]) == 0
    page = (output / "report.html").read_text()
    assert "<b>.npy" not in page and "&lt;b&gt;" in page
    assert "no data to evaluate on" in page
    other = tmp_path / "other.npy"
    save_prompt(other, normal(3, 8))
    with pytest.raises(UserError, match="different models"):
        analyze([file, other])
    with pytest.raises(UserError, match="at least one prompt"):
        analyze([])


def test_words_are_those_of_the_vocabulary() -> None:
    model = load_model(str(tiny_run.model_folder()))
    words = vocabulary_of(model)
    rows = embedding_rows(model, words)
    assert len(rows) == words.size < model.config.vocab_size


def test_words_of_a_scaled_model_are_in_the_space_of_its_prompts() -> None:
    """Gemma scales the embeddings of tokens, and not prompts: a copied word is at distance 0."""
    model = tiny_lm.make_lm("gemma")
    rows = embedding_rows(model, cast(Any, SimpleNamespace(size=tiny_lm.V)))
    scale = tiny_lm.FAMILIES["gemma"]["embedding_scale"]
    np.testing.assert_allclose(rows, scale * model.token_embedder.table()[:], rtol=1e-6)
    copied = model.embedding_table()[jnp.asarray([5])]
    ids, distances = nearest_tokens(copied, rows, number=1, by="euclidean")
    assert ids.tolist() == [[5]] and float(distances[0, 0]) < 1e-2


def test_positions_of_a_decoder_only_model(tmp_path: Path) -> None:
    """What follows a position that is left out moves forward, also beyond one group of prompts."""
    ids = dataclasses.replace(tiny_lm.make_lm().config.token_ids, eos=1)
    lm = tiny_lm.make_lm(vocab_size=tiny_run.CONFIG.vocab_size, token_ids=ids)
    words = tiny_run.vocabulary_file()
    params = param_tree.split(lm)[1]
    write_hf(tmp_path / "lm", lm.config, params, vocabulary_file=words, dtype="float32")
    of = experiment("w", {"model.name_or_path": str(tmp_path / "lm"), "data.buckets": "none"})
    prompt = 3 * normal(17, tiny_lm.D)
    effects = leave_one_out(of, prompt)
    assert effects is not None and effects.loss_P is not None and effects.examples == 24
    assert len(np.unique(effects.loss_P)) == len(effects.scores_P) == 17
    wholes = []
    for position in (0, 16):
        shorter = evaluate(of, prompts=[np.delete(prompt, position, axis=0)])
        assert effects.scores_P[position] == shorter.mean["accuracy"]
        ((examples, predictions),) = zip(
            shorter.examples.values(), shorter.predictions.values(), strict=True
        )
        losses = [
            np.log(np.exp(list(known.values())).sum()) - known[example["targets"]]
            for known, example in zip(predictions.log_probs_EN[0], examples.texts, strict=True)
        ]
        wholes.append(np.mean(losses) - effects.loss_P[position])
    assert wholes[0] == pytest.approx(wholes[1], abs=1e-5)  # the loss of the whole prompt
