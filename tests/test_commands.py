"""Evaluate, predict, inspect and tasks through the Python functions, on runs of a micro T5."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.lazy_arrays import in_memory
from prompt_tuning_jax.checkpoints.load import load_model
from prompt_tuning_jax.checkpoints.parameters import PROMPT
from prompt_tuning_jax.checkpoints.peft.adapter_file import write_peft
from prompt_tuning_jax.checkpoints.prompt_file import load_prompt, save_prompt
from prompt_tuning_jax.checkpoints.t5x.writer import write_t5x
from prompt_tuning_jax.cli.task_listing import examples, tasks
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.api import generate, score
from prompt_tuning_jax.inference.evaluation import EvalResult, evaluate
from prompt_tuning_jax.inference.inspection import inspect
from prompt_tuning_jax.inference.loading import load_prompts
from prompt_tuning_jax.inference.prediction import predict
from prompt_tuning_jax.inference.results import print_scores, short_names
from prompt_tuning_jax.methods import FullTuning, NoTuning
from prompt_tuning_jax.training.run import RunResult, train
from tests import tiny_run
from tests.tiny_run import LABELS, experiment

TARGETS = [row["targets"] for row in tiny_run.rows(24, seed=2)]
INPUTS = [row["inputs"] for row in tiny_run.rows(24, seed=2)]
FULL: dict[str, Any] = {
    "method": FullTuning(),
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 0.01,
    "training.seeds": (0, 1),
    "training.eval_every": 3,
}
WIDTH = tiny_run.CONFIG.embed_dim


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two prompts, of different scores."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    train(experiment(folder, {"training.seeds": (0, 1)}), quiet=True)
    return folder


@pytest.fixture(scope="module")
def short_prompt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ``.npy`` of another length, as other programs write it."""
    path = tmp_path_factory.mktemp("prompts") / "short.npy"
    np.save(path, np.random.default_rng(3).normal(0, 5, (3, WIDTH)).astype(np.float32))
    return path


def files(run: Path, ending: str = "safetensors") -> list[str]:
    return [str(run / f"prompts/seed_{seed}.{ending}") for seed in (0, 1)]


def test_a_run_scores_what_it_scored_in_training(run: Path) -> None:
    result = evaluate(experiment(run), prompts=[str(run)])
    best = json.loads((run / "results.json").read_text())["best"]
    assert result.split == "validation"
    assert [Path(name).stem for name in result.names] == ["seed_0", "seed_1"] == list(best)
    for own, name in zip(result.per_prompt, best, strict=True):
        assert {"step": best[name]["step"], **own} == best[name]


def test_files_arrays_and_folders_are_the_same_prompts(run: Path) -> None:
    expected = evaluate(experiment(run), prompts=[str(run)])
    arrays = [load_prompt(file) for file in files(run)]
    for prompts in (files(run), files(run, "npy"), arrays, [run], [files(run)[0], arrays[1]]):
        found = evaluate(experiment(run), prompts=prompts)
        assert found.per_prompt == expected.per_prompt
        assert found.ensemble == expected.ensemble
        assert len(found.names) == len(set(found.names)) == 2


def test_a_folder_of_prompts_is_all_of_them(run: Path, tmp_path: Path) -> None:
    expected = evaluate(experiment(run), prompts=[str(run)])
    for file in files(run):
        folder = tmp_path / "adapters" / Path(file).stem
        write_peft(folder, load_prompt(file), base_model_name_or_path="anything")
    for place in (run / "prompts", tmp_path / "adapters"):
        found = evaluate(experiment(run), prompts=[str(place)])
        assert found.per_prompt == expected.per_prompt and found.ensemble == expected.ensemble
    (tmp_path / "adapters/notes.txt").write_text("")
    with pytest.raises(UserError, match="one by one the prompts in it: seed_0, seed_1"):
        evaluate(experiment(run), prompts=[str(tmp_path / "adapters")])


def test_a_file_of_ones_own_is_named(run: Path, tmp_path: Path) -> None:
    test = tiny_run.write_rows(tmp_path / "test.jsonl", tiny_run.rows(24, seed=2))
    found = evaluate(experiment(run, {"data.eval": str(test)}), prompts=[str(run)])
    assert found.title == str(test) and found.split == "validation"
    assert any(line.startswith(f"{test}: 24 examples, ") for line in found.reports)


def test_a_table_shows_what_sets_names_apart(capsys: pytest.CaptureFixture[str]) -> None:
    """In full where stdout is no terminal, however long they are."""
    long = "x" * 120
    names = [f"/a/{long}/one/prompts/seed_0.npy", f"/a/{long}/two/prompts/seed_{long}.npy"]
    assert short_names(names) == ["one/prompts/seed_0.npy", f"two/prompts/seed_{long}.npy"]
    assert short_names(names[:1]) == ["seed_0.npy"]
    assert short_names(["p", "a/p"]) == ["p", "a/p"]
    values = {"accuracy": 50.0}
    result = EvalResult(
        names=tuple(names),
        per_prompt=[values, values],
        mean=values,
        best=values,
        ensemble=values,
        split="test",
        title="test.jsonl",
        predictions={},
        reports=(),
    )
    print_scores(result)
    assert f" two/prompts/seed_{long}.npy " in capsys.readouterr().out


def test_scores_are_those_of_the_label_strings(run: Path) -> None:
    """Against the slow way: each label's log-probability by itself, one prompt at a time."""
    model = load_model(str(tiny_run.model_folder()))
    found = evaluate(experiment(run, {"data.inputs_length": 32}), prompts=files(run))
    for member, file in enumerate(files(run)):
        prompt = load_prompt(file)
        scores_CN = np.stack([score(model, INPUTS, [c] * len(INPUTS), prompt) for c in LABELS])
        texts = [LABELS[i] for i in scores_CN.argmax(axis=0)]
        assert found.predictions["file:train.jsonl"].texts_EN[member] == texts
        hits = [text == target for text, target in zip(texts, TARGETS, strict=True)]
        assert found.per_prompt[member]["accuracy"] == pytest.approx(100 * np.mean(hits))


def test_prompts_of_different_lengths_vote_together(run: Path, short_prompt: Path) -> None:
    other = np.random.default_rng(4).normal(0, 5, (3, WIDTH))
    prompts: list[Any] = [files(run)[0], str(short_prompt), files(run)[1], other]
    result = evaluate(experiment(run), prompts=prompts)
    # Of one length they stand together, each with its own name.
    alone = {
        name: evaluate(experiment(run), prompts=[one]).per_prompt[0]
        for name, one in zip(
            [files(run)[0], str(short_prompt), files(run)[1], "prompt 3"], prompts, strict=True
        )
    }
    assert set(result.names) == set(alone)
    assert [alone[name] for name in result.names] == result.per_prompt
    accuracies = [own["accuracy"] for own in result.per_prompt]
    assert len(set(accuracies)) > 1
    assert result.mean["accuracy"] == pytest.approx(np.mean(accuracies))
    assert result.best == result.per_prompt[int(np.argmax(accuracies))]
    predictions = result.predictions["file:train.jsonl"]
    votes = [_vote(i, predictions) for i in range(len(TARGETS))]
    hits = [vote == target for vote, target in zip(votes, TARGETS, strict=True)]
    assert result.ensemble is not None
    assert result.ensemble["accuracy"] == pytest.approx(100 * np.mean(hits))


def _vote(example: int, predictions: Any) -> str:
    counts = Counter(texts[example] for texts in predictions.texts_EN)
    most = max(counts.values())
    tied = [text for text, count in counts.items() if count == most]
    return max(
        tied, key=lambda text: sum(known[example][text] for known in predictions.log_probs_EN)
    )


def test_one_prompt_has_no_ensemble(short_prompt: Path, tmp_path: Path) -> None:
    result = evaluate(experiment(tmp_path), prompts=[str(short_prompt)])
    assert result.ensemble is None
    assert result.best == result.mean == result.per_prompt[0]


def test_no_prompt_is_the_bare_model(tmp_path: Path, run: Path) -> None:
    model = load_model(str(tiny_run.model_folder()))
    longer = {"data.inputs_length": 32}
    for changes in (longer, {**longer, "method": NoTuning()}):
        result = evaluate(experiment(tmp_path, changes), prompts=[])
        assert result.names == ("no prompt",)
        scores_CN = np.stack([score(model, INPUTS, [c] * len(INPUTS)) for c in LABELS])
        texts = [LABELS[i] for i in scores_CN.argmax(axis=0)]
        assert result.predictions["file:train.jsonl"].texts_EN == [texts]
    assert evaluate(experiment(run), prompts=[str(run)]).predictions != result.predictions


def test_another_split(run: Path) -> None:
    result = evaluate(experiment(run), prompts=[str(run)], split="train")
    assert result.split == "train"
    assert len(result.predictions["file:train.jsonl"].texts_EN[0]) == 48
    with pytest.raises(UserError, match="no split 'trian': did you mean 'train'"):
        evaluate(experiment(run), prompts=[str(run)], split="trian")


def test_the_size_of_batches_makes_no_difference(run: Path) -> None:
    whole = evaluate(experiment(run), prompts=[str(run)])
    parts = evaluate(experiment(run, {"evaluation.batch_size": 7}), prompts=[str(run)])
    assert parts.per_prompt == whole.per_prompt


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult]:
    """A finished run of model tuning, of two seeds."""
    folder = tmp_path_factory.mktemp("runs") / "full"
    return folder, train(experiment(folder, FULL), quiet=True)


def test_model_tuning_trains_every_weight(full: tuple[Path, RunResult]) -> None:
    folder, result = full
    model = load_model(str(tiny_run.model_folder()))
    start = param_tree.split(model)[1]
    assert {f"model/{name}" for name in start} == result.best_tuned.keys()
    for name, value in start.items():
        trainable = result.best_tuned[f"model/{name}"]
        assert trainable.shape == (2, *value.shape)
        for member in range(2):
            assert np.any(trainable[member] != np.asarray(value)), name
    assert not (folder / "prompts").exists()


def test_model_tuning_evaluates_from_its_best_checkpoint(
    run: Path, full: tuple[Path, RunResult]
) -> None:
    folder, _ = full
    changes = FULL
    best = json.loads((folder / "results.json").read_text())["best"]
    result = evaluate(experiment(folder, changes), prompts=[str(folder)])
    assert result.names == tuple(f"{folder}/{name}" for name in best)
    expected = [{k: v for k, v in own.items() if k != "step"} for own in best.values()]
    assert result.per_prompt == expected
    # Beside a prompt, which is used with the frozen model and not with the tuned one.
    both = evaluate(experiment(folder, changes), prompts=[files(run)[0], str(folder)])
    alone = evaluate(experiment(run), prompts=[files(run)[0]])
    assert dict(zip(both.names, both.per_prompt, strict=True)) == {
        **dict(zip(result.names, expected, strict=True)),
        files(run)[0]: alone.per_prompt[0],
    }
    wider = dataclasses.replace(tiny_run.CONFIG, embed_dim=24)
    other = experiment(
        folder, {**changes, "model.name_or_path": str(tiny_run.model_folder(config=wider))}
    )
    with pytest.raises(UserError, match="shapes do not match"):
        evaluate(other, prompts=[str(folder)])


def test_arrays_that_are_no_prompts_are_refused(tmp_path: Path) -> None:
    for array in (np.zeros((3, WIDTH + 1)), np.zeros(WIDTH), np.zeros((2, 3, WIDTH))):
        with pytest.raises(UserError, match=r"prompts\[0\] has shape \["):
            evaluate(experiment(tmp_path), prompts=[array])


def test_a_prompt_is_used_as_it_was_trained(tmp_path: Path) -> None:
    """Where the prompt stands is a property of the prompt, not of who evaluates it."""
    train(experiment(tmp_path / "run", {"method.placement": "before_eos"}), quiet=True)
    right = evaluate(
        experiment(tmp_path, {"method.placement": "before_eos"}), prompts=[str(tmp_path / "run")]
    )
    file = str(tmp_path / "run/prompts/seed_0.safetensors")
    array = load_prompt(file)
    wrong = evaluate(experiment(tmp_path), prompts=[array])
    assert _log_probs(wrong) != _log_probs(right)
    for prompt in (str(tmp_path / "run"), file):
        assert _log_probs(evaluate(experiment(tmp_path), prompts=[prompt])) == _log_probs(right)


def _log_probs(result: EvalResult) -> Any:
    return result.predictions["file:train.jsonl"].log_probs_EN


def test_predictions_are_labels_with_votes(run: Path, short_prompt: Path) -> None:
    prompts = [str(run), str(short_prompt)]
    longer = {"data.inputs_length": 32}
    found = predict(experiment(run, longer), prompts=prompts, inputs=INPUTS)
    expected = evaluate(experiment(run, longer), prompts=prompts).predictions["file:train.jsonl"]
    for i, one in enumerate(found):
        texts = Counter(texts[i] for texts in expected.texts_EN)
        assert one.votes == dict(texts) and sum(one.votes.values()) == 3
        assert one.prediction == _vote(i, expected)
        assert one.log_probs is not None and set(one.log_probs) == set(LABELS)
        for label, value in one.log_probs.items():
            mean = np.mean([known[i][label] for known in expected.log_probs_EN])
            assert value == pytest.approx(mean)
    (alone,) = predict(experiment(run), prompts=files(run)[:1], inputs=["red bar"])
    assert alone.votes is None and alone.prediction in LABELS


def test_free_text_is_written(run: Path, short_prompt: Path) -> None:
    model = load_model(str(tiny_run.model_folder()))
    changes = {"evaluation.strategy": "greedy", "data.inputs_length": 32}
    for prompts, array in (([str(short_prompt)], np.load(short_prompt)), ([], None)):
        found = predict(experiment(run, changes), prompts=prompts, inputs=INPUTS[:5])
        written = generate(model, INPUTS[:5], prompt=array, max_length=4)
        assert [one.prediction for one in found] == written.texts
        for one, value in zip(found, written.scores, strict=True):
            assert one.log_probs == {one.prediction: pytest.approx(float(value), abs=1e-4)}


def test_predicting_without_labels_writes(tmp_path: Path, short_prompt: Path) -> None:
    """More distinct targets than can be labels; and the training file may be gone by then."""
    many = [{"inputs": w, "targets": f"{w} {i}"} for i, w in enumerate(tiny_run.WORDS[:60])]
    file = tiny_run.write_rows(tmp_path / "free.jsonl", many)
    free = {"data.train": str(file), "data.eval": str(file)}
    ranked = predict(experiment(tmp_path, free), prompts=[str(short_prompt)], inputs=["red"])
    file.unlink()
    greedy = {**free, "evaluation.strategy": "greedy"}
    written = predict(experiment(tmp_path, greedy), prompts=[str(short_prompt)], inputs=["red"])
    assert written == ranked


def test_inspect_says_what_a_path_is(run: Path, short_prompt: Path) -> None:
    found = dict(inspect(str(run)))
    assert found["kind"] == "run" and found["method"] == "PromptTuning"
    assert found["last checkpoints"].split(", ")[-1] == "step 12"
    best = json.loads((run / "results.json").read_text())["best"]
    assert found["seed_1.safetensors"] == (
        f"[5, 16], accuracy {best['seed_1']['accuracy']:.2f} at step {best['seed_1']['step']}"
    )
    prompt = dict(inspect(files(run)[0]))
    model = dict(inspect(str(tiny_run.model_folder())))
    assert (prompt["kind"], prompt["length"], prompt["width"]) == (
        "prompt (safetensors)",
        "5",
        "16",
    )
    assert prompt["model fingerprint"] == model["fingerprint"]
    assert model["kind"] == "model (Hugging Face folder)"
    assert model["parameters"] == "13,040" and model["embed_dim"] == "16"
    bare = dict(inspect(str(short_prompt)))
    assert bare["length"] == "3" and "model fingerprint" not in bare


def test_a_prompt_is_the_same_in_every_form(run: Path, tmp_path: Path) -> None:
    """A file of either kind, a PEFT adapter, inside a T5X checkpoint that is the model as well."""
    file = files(run)[0]
    prompt_PD = load_prompt(file)
    model = load_model(str(tiny_run.model_folder()))
    params = {
        name: in_memory(np.asarray(p), where=name) for name, p in param_tree.split(model)[1].items()
    }
    checkpoint = write_t5x(tmp_path, params, step=7, trained={PROMPT: prompt_PD})
    adapter = tmp_path / "adapter"
    write_peft(adapter, prompt_PD, base_model_name_or_path="anything")
    np.save(tmp_path / "prompt.npy", prompt_PD)

    forms = {"npy": tmp_path / "prompt.npy", "PEFT": adapter, "T5X": checkpoint}
    opened = load_prompts(experiment(run), model, [file, *map(str, forms.values())])
    (group,) = opened.groups
    for trainable in np.asarray(group.trainable["method/prompt_PD"]):
        np.testing.assert_array_equal(trainable, prompt_PD)
    assert dict(inspect(str(adapter)))["kind"] == "prompt (PEFT adapter)"
    # A checkpoint with a prompt in it is first of all a model.
    described = dict(inspect(str(checkpoint)))
    assert described["kind"] == "model (T5X checkpoint)"
    assert described["parameters"] == "13,040"
    with pytest.raises(UserError, match="is a folder without a run's"):
        load_prompts(experiment(run), model, [str(tiny_run.model_folder())])


def test_tasks_are_listed_and_shown() -> None:
    assert "word_valence" in dict(tasks())
    model = str(tiny_run.model_folder())
    shown = list(examples("word_valence", limit=2, model=model))
    assert len(shown) == 2
    words = load_model(model).vocabulary
    assert words is not None
    for example in shown:
        assert example["inputs_ids"] == [*words.encode(example["inputs"]), 1]
        assert example["inputs_length"] == len(example["inputs_ids"])
        assert example["targets"] in ("terrible", "beautiful")


def test_a_prompt_of_another_model_is_refused(run: Path, tmp_path: Path) -> None:
    other = experiment(tmp_path, {"model.name_or_path": str(tiny_run.model_folder(seed=1))})
    with pytest.raises(UserError, match="was trained for another model"):
        evaluate(other, prompts=[str(run)])
    # Without metadata nothing says so.
    bare = tmp_path / "bare.npy"
    save_prompt(bare, load_prompt(files(run)[0]))
    evaluate(other, prompts=[str(bare)])
