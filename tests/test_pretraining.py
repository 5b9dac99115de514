"""Training on plain text: from random weights, resumed, adapted, written back as a model."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.load import load_model, random_model
from prompt_tuning_jax.config.experiment import Data, Experiment, Training
from prompt_tuning_jax.data.vocabularies.vocab import load_vocabulary
from prompt_tuning_jax.distributed.sharding import Partitioner, make_mesh
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.conversion import export_model
from prompt_tuning_jax.methods import Context, FullTuning, PromptTuning, attach_method
from prompt_tuning_jax.models.t5.config import PRESETS, T5Config
from prompt_tuning_jax.pretraining import probes
from prompt_tuning_jax.pretraining.initializations import cooccurrence_embeddings, start_attention
from prompt_tuning_jax.pretraining.run import pretrain
from prompt_tuning_jax.pretraining.text_corpus import load_corpus
from prompt_tuning_jax.pretraining.text_data import (
    TextData,
    build_text_data,
    start_from_cooccurrence,
    text_losses,
)
from prompt_tuning_jax.training.run import train
from tests import tiny_run
from tests.micro import call, shifted
from tests.tiny_run import measurements, outcome

BOTH: tuple[Any, ...] = ("span_corruption", "prefix_lm")


def pretraining_run(workdir: Path, changes: dict[str, Any] | None = None) -> Experiment:
    """All weights of a preset called ``micro``, drawn at random, on both objectives."""
    base: dict[str, Any] = {
        "model.name_or_path": "micro",
        "model.random_weights": True,
        "model.vocabulary": str(tiny_run.vocabulary_file()),
        "model.dropout_rate": 0.0,
        "method": FullTuning(),
        "data.train": str(tiny_run.text_folder()),
        "data.eval": "",
        "data.objectives": BOTH,
        "data.targets_length": 8,
        "optimizer.name": "adamw",
        "optimizer.learning_rate": 0.01,
        "training.batch_size": 8,
    }
    return tiny_run.experiment(workdir, {**base, **(changes or {})})


@pytest.fixture(autouse=True)
def micro(monkeypatch: pytest.MonkeyPatch) -> T5Config:
    monkeypatch.setitem(PRESETS, "micro", tiny_run.CONFIG)
    return tiny_run.CONFIG


ONE_DEVICE = Partitioner(mesh=make_mesh(devices=jax.devices()[:1]))


def text_data(**changes: Any) -> TextData:
    data = Data(
        train=str(tiny_run.text_folder()),
        objectives=changes.pop("objectives", BOTH),
        inputs_length=16,
        targets_length=8,
        **changes,
    )
    words = load_vocabulary(tiny_run.vocabulary_file())
    of = Experiment(data=data, training=Training(batch_size=4, seeds=(0, 5)))
    return build_text_data(of, words)


def test_the_loss_falls_and_the_model_comes_back(tmp_path: Path) -> None:
    changes = {"training.steps": 40, "training.eval_every": 10, "training.log_every": 10}
    result = pretrain(pretraining_run(tmp_path / "run", changes), quiet=True)
    records = measurements(tmp_path / "run")
    losses = [r["loss"][0] for r in records if r["kind"] == "train"]
    evaluated = [r["metrics"][0]["loss"] for r in records if r["kind"] == "eval"]
    # From knowing nothing of 208 pieces.
    assert losses[0] > 4.5 and losses[-1] < losses[0] - 0.5
    assert evaluated[-1] < evaluated[0]
    best = result.best[0]
    assert best is not None and best.metrics == {"loss": min(evaluated)}
    assert not (tmp_path / "run/prompts").exists()

    export_model(tmp_path / "run", tmp_path / "model")
    model = load_model(str(tmp_path / "model"))
    data = dataclasses.replace(text_data(), batch_size=8)
    # What is written is bfloat16.
    assert _losses(model, data) == pytest.approx([min(evaluated)], rel=0.005)
    # And it goes on from there: LM adaptation, of the written model, by the other objective.
    adapted = pretraining_run(
        tmp_path / "adapted",
        {
            "model.name_or_path": str(tmp_path / "model"),
            "model.random_weights": False,
            "model.vocabulary": "",
            "data.objectives": ("prefix_lm",),
            "training.steps": 4,
        },
    )
    assert pretrain(adapted, quiet=True).finished
    start = _losses(model, dataclasses.replace(text_data(objectives=("prefix_lm",)), batch_size=8))
    first = next(r for r in measurements(tmp_path / "adapted") if r["kind"] == "eval")
    assert first["metrics"][0]["loss"] < start[0]
    with pytest.raises(UserError, match="holds no run"):
        export_model(tmp_path / "model", tmp_path / "other")


def _losses(model: Any, data: TextData) -> list[float]:
    attached = attach_method(model, FullTuning(), key=jax.random.key(0), context=Context())
    graphdef, params = param_tree.split(attached)
    trainable = {name: p[None] for name, p in params.items()}
    return [own["loss"] for own in text_losses(graphdef, trainable, {}, data)]


def test_the_evaluation_is_the_mean_over_tokens() -> None:
    """Of batches with different numbers of tokens, with no vmap."""
    data = text_data()
    model = load_model(str(tiny_run.model_folder()))
    loss = tokens = 0.0
    for batch in data.eval_batches():
        logits = call(model, batch["inputs"], shifted(batch["targets"]))
        logs = np.asarray(jax.nn.log_softmax(logits))
        targets = batch["targets"]
        own = np.take_along_axis(logs, targets[..., None], axis=2)[..., 0]
        loss -= float(own[targets > 0].sum())
        tokens += float((targets > 0).sum())
    assert _losses(model, data) == pytest.approx([loss / tokens], rel=1e-4)
    again = [batch["inputs"] for batch in data.eval_batches()]
    for one, other in zip(again, data.eval_batches(), strict=True):
        np.testing.assert_array_equal(one, other["inputs"])


def test_held_out_text_is_not_trained_on() -> None:
    whole = load_corpus(tiny_run.text_folder(), load_vocabulary(tiny_run.vocabulary_file()))
    data = text_data()
    held_out = max(math.ceil(0.005 * len(whole.tokens)), 4 * 16)
    assert len(data.evaluation.tokens) == held_out
    np.testing.assert_array_equal(
        np.concatenate([data.train.tokens, data.evaluation.tokens]), whole.tokens
    )
    assert data.reports == (
        f"{len(whole.tokens) - held_out:,} tokens of text to train on, {held_out:,} to evaluate on",
    )


def test_batches_come_from_their_own_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training text in even pieces and evaluation text in odd ones: no batch may mix them."""
    data = text_data(objectives=("prefix_lm",))
    special = 3
    even = np.arange(special, 91, dtype=data.train.tokens.dtype)
    even = np.resize(even[even % 2 == 0], 5000)
    split = {
        "train": dataclasses.replace(data.train, tokens=even),
        "evaluation": dataclasses.replace(data.train, tokens=even + 1),
    }
    data = dataclasses.replace(data, **split)
    for batches, parity in ((data.batches(0, 5, ONE_DEVICE), 0), (data.eval_batches(), 1)):
        for batch in batches:
            for name in ("inputs", "targets"):
                tokens = np.asarray(batch[name])
                tokens = tokens[tokens >= special]
                assert tokens.size and np.all(tokens % 2 == parity)


def test_text_of_its_own_to_evaluate_on(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("red green blue " * 50)
    data = text_data(eval=str(tmp_path))
    words = load_vocabulary(tiny_run.vocabulary_file())
    whole = load_corpus(tiny_run.text_folder(), words)
    assert len(data.train.tokens) == len(whole.tokens)
    assert words.decode(data.evaluation.tokens[:6].tolist()).startswith("red green blue")


def test_each_member_sees_text_of_its_own_in_any_order() -> None:
    data = text_data()
    batches = list(data.batches(0, 4, ONE_DEVICE))
    assert batches[0]["inputs"].shape == (2, 4, 16)
    assert batches[0]["targets"].shape == (2, 4, 8)
    assert np.any(batches[0]["inputs"][0] != batches[0]["inputs"][1])
    (later,) = data.batches(3, 4, ONE_DEVICE)
    for name, array in later.items():
        np.testing.assert_array_equal(array, batches[3][name])


def test_objectives_and_weights_are_as_asked() -> None:
    words = load_vocabulary(tiny_run.vocabulary_file())

    def share_with_sentinels(**changes: Any) -> float:
        (batch,) = dataclasses.replace(text_data(**changes), batch_size=200).batches(
            0, 1, ONE_DEVICE
        )
        return float((batch["targets"][..., 0] == words.sentinel(0)).mean())

    assert share_with_sentinels(objectives=("span_corruption",)) == 1
    assert share_with_sentinels(objectives=("prefix_lm",)) == 0
    assert 0.35 < share_with_sentinels() < 0.65
    assert 0.8 < share_with_sentinels(objective_weights=(9.0, 1.0)) < 1


def test_it_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"training.steps": 6, "training.eval_every": 2, "training.log_every": 4}
    assert pretrain(pretraining_run(tmp_path / "whole", changes), quiet=True).finished
    losses = text_losses

    class Killed(BaseException):
        pass

    from prompt_tuning_jax.pretraining import run

    def kill(*args: Any) -> Any:
        scores = losses(*args)
        if int(state["left"]) == 0:
            raise Killed
        state["left"] -= 1
        return scores

    for left in (1, 1):  # in the evaluations of step 4, and of step 6
        state = {"left": left}
        with monkeypatch.context() as patch:
            patch.setattr(run, "text_losses", kill)
            with pytest.raises(Killed):
                pretrain(pretraining_run(tmp_path / "killed", changes), quiet=True)
    assert pretrain(pretraining_run(tmp_path / "killed", changes), quiet=True).finished
    (tmp_path / "whole/prompts").mkdir()
    (tmp_path / "killed/prompts").mkdir()
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_a_prompt_is_trained_on_text_too(tmp_path: Path) -> None:
    changes = {
        "model.name_or_path": str(tiny_run.model_folder()),
        "model.random_weights": False,
        "method": PromptTuning(length=3, init="sampled_vocabulary", init_population=0),
        "training.steps": 4,
    }
    result = pretrain(pretraining_run(tmp_path, changes), quiet=True)
    assert result.best[0] is not None
    assert (tmp_path / "prompts/seed_0.npy").is_file()


def test_the_start_from_cooccurrence(micro: T5Config) -> None:
    words = load_vocabulary(tiny_run.vocabulary_file())
    corpus = load_corpus(tiny_run.text_folder(), words)
    model = random_model("micro", vocabulary=str(tiny_run.vocabulary_file()))
    before = param_tree.split(model)[1]
    start_from_cooccurrence(model, corpus)
    after = param_tree.split(model)[1]
    table_VD = cooccurrence_embeddings(
        corpus.tokens, vocab_size=micro.vocab_size, embed_dim=micro.embed_dim
    )
    np.testing.assert_array_equal(after["token_embedder/embedding"], table_VD)
    np.testing.assert_allclose(
        after["decoder/logits_dense/kernel"], table_VD.T * micro.embed_dim**-0.5, rtol=1e-6
    )
    for name in before.keys() - {"token_embedder/embedding", "decoder/logits_dense/kernel"}:
        np.testing.assert_array_equal(before[name], after[name])


def test_a_run_starts_from_cooccurrence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {
        "model.embeddings": "cooccurrence",
        "training.steps": 1,
        "optimizer.learning_rate": 0.0,
        "optimizer.weight_decay": 0.0,
    }
    result = pretrain(pretraining_run(tmp_path, changes), quiet=True)
    data = text_data()
    table_VD = cooccurrence_embeddings(data.train.tokens, vocab_size=208, embed_dim=16)
    got_VD = result.best_tuned["model/token_embedder/embedding"][0]
    np.testing.assert_allclose(got_VD, table_VD, atol=1e-6)


@pytest.mark.parametrize("attention", ["mimetic", "matching"])
def test_a_run_starts_from_the_attention_of_its_config(tmp_path: Path, attention: str) -> None:
    changes = {
        "model.attention_init": attention,
        "training.steps": 1,
        "training.seeds": (3,),
        "optimizer.learning_rate": 0.0,
        "optimizer.weight_decay": 0.0,
    }
    result = pretrain(pretraining_run(tmp_path, changes), quiet=True)
    model = random_model("micro", seed=3, vocabulary=str(tiny_run.vocabulary_file()))
    start_attention(model, matching=attention == "matching", seed=3)
    for name, array in param_tree.split(model)[1].items():
        np.testing.assert_allclose(result.best_tuned[f"model/{name}"][0], array, atol=1e-6)


def test_the_seed_decides_the_random_weights() -> None:
    vocabulary = str(tiny_run.vocabulary_file())
    models = [random_model("micro", seed=seed, vocabulary=vocabulary) for seed in (0, 0, 1)]
    tables = [nnx.state(model)["token_embedder"]["embedding"].get_value() for model in models]
    np.testing.assert_array_equal(tables[0], tables[1])
    assert np.any(tables[0] != tables[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data.objectives": ("prefix_lm",), "data.inputs_length": 30_000},
            "held out for evaluation",
        ),
        ({"data.inputs_length": 2000, "data.targets_length": 1000}, "no sentinel <extra_id_100>"),
        ({"data.targets_length": 2}, "targets_length 2 is too short"),
        ({"data.train": "/nowhere/at/all"}, "/nowhere/at/all: no such text file"),
        ({"model.name_or_path": "mikro"}, "no preset is called 'mikro'; did you mean micro"),
        ({"model.vocabulary": ""}, "came without a vocabulary"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_at_once(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        pretrain(pretraining_run(tmp_path / "run", changes), quiet=True)
    assert not (tmp_path / "run").exists()


def test_train_names_pretrain(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.objectives.*call pretrain"):
        train(pretraining_run(tmp_path / "run"), quiet=True)
    assert not (tmp_path / "run").exists()


def test_cooccurrence_without_text_is_refused(tmp_path: Path) -> None:
    changes = {
        "data.objectives": (),
        "model.embeddings": "cooccurrence",
        "data.train": str(tiny_run.train_file()),
        "data.eval": str(tiny_run.eval_file()),
    }
    with pytest.raises(UserError, match=r"set data\.objectives"):
        pretrain(pretraining_run(tmp_path / "run", changes), quiet=True)
    assert not (tmp_path / "run").exists()


def test_probes_tune_a_prompt_on_the_weights_of_the_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the loss, the same each time for the same weights, and leaving no trace in them."""
    monkeypatch.setattr(probes, "STEPS", 12)
    monkeypatch.setattr(probes, "PROMPT_LENGTH", 4)
    files = f"{tiny_run.train_file()}:{tiny_run.eval_file()}"
    changes = {
        "data.probes": (files,),
        "training.steps": 4,
        "training.eval_every": 2,
        "training.log_every": 2,
    }
    experiment = pretraining_run(tmp_path / "run", changes)
    pretrain(experiment, quiet=True)
    plain = pretraining_run(tmp_path / "plain", {**changes, "data.probes": ()})
    pretrain(plain, quiet=True)
    probed, unprobed = (
        [r["metrics"][0] for r in measurements(tmp_path / name) if r["kind"] == "eval"]
        for name in ("run", "plain")
    )
    assert [own["loss"] for own in probed] == [own["loss"] for own in unprobed]
    assert all(0 <= own["probe_train"] <= 100 for own in probed)

    model = load_model(str(tiny_run.model_folder()))
    probe = probes.Probe(files, experiment, model)
    weights = param_tree.split(
        attach_method(model, FullTuning(), key=jax.random.key(0), context=Context())
    )[1]
    trained = probe.score(weights)
    assert trained == probe.score(weights)
    # Blank weights can only answer the same to all.
    blank = probe.score({name: np.zeros_like(p) for name, p in weights.items()})
    assert blank < trained


def test_probes_and_the_dictionary_need_what_they_are_made_of(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.probes needs data\.objectives"):
        pretrain(
            pretraining_run(tmp_path, {"data.probes": ("word_valence",), "data.objectives": ()})
        )
    with pytest.raises(UserError, match=r"data\.dictionary is empty"):
        pretrain(pretraining_run(tmp_path, {"data.objectives": ("dictionary",)}))


def test_probes_of_files_of_one_name_are_told_apart() -> None:
    specs = (
        "word_valence",
        "a/train.jsonl:a/dev.jsonl",
        "b/train.jsonl:b/dev.jsonl",
        "c.csv:d.csv",
    )
    assert probes.probe_names(specs) == ("word_valence", "a_train", "b_train", "c")
    with pytest.raises(UserError, match="two probes named a_train"):
        probes.probe_names((*specs, "x/a/train.jsonl:b/dev.jsonl"))
