"""Whole runs: what they leave behind, and that no interruption makes a difference."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from prompt_tuning_jax.checkpoints import run_folder, train_state
from prompt_tuning_jax.checkpoints.load import load_model
from prompt_tuning_jax.checkpoints.prompt_file import load_prompt, load_prompt_with_metadata
from prompt_tuning_jax.config.config_file import run_config
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.data.batching import task_data
from prompt_tuning_jax.inference.setup import Members, attach_members, model_fingerprint
from prompt_tuning_jax.methods import PROMPT
from prompt_tuning_jax.models.t5.config import PRESETS
from prompt_tuning_jax.training import build, run
from prompt_tuning_jax.training.logging import RunLog
from prompt_tuning_jax.training.run import RunResult, train
from tests import tiny_run
from tests.tiny_run import experiment, measurements, outcome, tree_bytes

# Two members, each with a best step of its own.  Saves, evaluations and log lines seldom coincide:
# a resumed run must also know what the next log line averages over.
INTERRUPTED: dict[str, Any] = {
    "model.dropout_rate": 0.1,
    "training.seeds": (0, 1),
    "training.steps": 8,
    "training.eval_every": 2,
    "training.save_every": 3,
    "training.log_every": 4,
}


class Killed(BaseException):
    """Nothing handles it, as nothing handles SIGKILL."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult]:
    """A run of twelve steps and two seeds."""
    folder = tmp_path_factory.mktemp("run") / "finished"
    return folder, train(experiment(folder, {"training.seeds": (0, 1)}), quiet=True)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("run") / "uninterrupted"
    assert train(experiment(folder, INTERRUPTED), quiet=True).finished
    return outcome(folder)


def test_a_run_leaves_all_that_it_should(finished: tuple[Path, RunResult]) -> None:
    folder, result = finished
    assert result.finished and result.step == 12 and result.names == ("seed_0", "seed_1")
    top = {path.name for path in folder.iterdir()}
    assert top == {
        "experiment.json",
        "metrics.jsonl",
        "curves.png",
        "results.json",
        "tensorboard",
        "prompts",
        "checkpoints",
    }
    assert run_config(str(folder)) == experiment(folder, {"training.seeds": (0, 1)})
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    kinds = [(record["kind"], record["step"]) for record in measurements(folder)]
    assert [step for kind, step in kinds if kind == "train"] == [2, 4, 6, 8, 10, 12]
    assert [step for kind, step in kinds if kind == "eval"] == [4, 8, 12]


def test_a_finished_run_says_only_that(
    finished: tuple[Path, RunResult],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At once: neither its model nor its data is opened."""
    folder, result = finished
    monkeypatch.setattr(run, "build_model", None)
    again = train(experiment(folder, {"training.seeds": (0, 1)}))
    said = capsys.readouterr().out
    assert said == f"{folder}: the run is finished at step 12; nothing was changed\n"
    assert (again.best, again.names, again.step) == (result.best, result.names, result.step)
    np.testing.assert_array_equal(again.best_tuned[PROMPT], result.best_tuned[PROMPT])


def test_fewer_examples_than_a_batch_are_noted(tmp_path: Path) -> None:
    train_set: Any = SimpleNamespace(examples_per_epoch=3)
    data = task_data.TaskData(
        train=train_set,
        targets_by_task={},
        evaluation={},
        labels=(),
        task_labels=(),
        best_by="",
        direction="max",
        reports=(),
    )
    graphdef: Any = None
    members = Members(graphdef=graphdef, trainable={}, frozen={}, mask={}, number=1)
    config = PRESETS["tiny"]
    *_, steps, note = run._introduction(experiment(tmp_path), members, data, config)
    assert steps == "12 steps of 4 examples: 16.0 epochs"
    assert note.startswith("note: a batch of 4 is larger than the 3 training examples")
    train_set.examples_per_epoch = 4000
    once = experiment(tmp_path, {"training.steps": 1})
    *_, steps = run._introduction(once, members, data, config)
    assert steps == "1 step of 4 examples: 0.001 epochs"


def test_results_prompts_and_metrics_agree(finished: tuple[Path, RunResult]) -> None:
    folder, result = finished
    results = json.loads((folder / "results.json").read_text())["best"]
    evaluations = {r["step"]: r["metrics"] for r in measurements(folder) if r["kind"] == "eval"}
    model = load_model(str(tiny_run.model_folder()))
    for member, name in enumerate(result.names):
        best = result.best[member]
        assert best is not None
        assert results[name] == {"step": best.step, **best.metrics}
        accuracies = {step: own[member]["accuracy"] for step, own in evaluations.items()}
        assert best.metrics["accuracy"] == max(accuracies.values())
        # Of equals the first.
        assert best.step == max(accuracies, key=lambda step: (accuracies[step], -step))
        prompt_PD, metadata = load_prompt_with_metadata(folder / f"prompts/{name}.safetensors")
        np.testing.assert_array_equal(prompt_PD, result.best_tuned[PROMPT][member])
        np.testing.assert_array_equal(prompt_PD, load_prompt(folder / f"prompts/{name}.npy"))
        assert metadata.model_fingerprint == model_fingerprint(model)
        assert metadata.model_name == str(tiny_run.model_folder())
        assert metadata.task == str(tiny_run.train_file())
        assert (metadata.init, metadata.combine) == ("class_labels", "prefix")
        assert (metadata.seed, metadata.steps) == (member, best.step)
        assert (metadata.metric, metadata.score) == ("accuracy", best.metrics["accuracy"])
        assert metadata.labels == tiny_run.LABELS


def test_each_member_keeps_a_best_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted = iter([(10.0, 30.0), (30.0, 10.0), (30.0, 20.0)])
    seen: list[np.ndarray] = []

    def evaluate(of: Experiment, members: Any, trainable: Any, *_: Any, **__: Any) -> Any:
        seen.append(np.array(trainable[PROMPT]))
        return [{"accuracy": value} for value in next(scripted)], {}

    monkeypatch.setattr(run, "evaluate_members", evaluate)
    result = train(experiment(tmp_path, {"training.seeds": (0, 1)}), quiet=True)
    assert [(own.step, own.metrics["accuracy"]) for own in result.best if own] == [(8, 30), (4, 30)]
    expected = np.stack([seen[1][0], seen[0][1]])
    np.testing.assert_array_equal(result.best_tuned[PROMPT], expected)
    np.testing.assert_array_equal(run_folder.read_best(tmp_path)[PROMPT], expected)
    for member, prompt in enumerate(expected):
        np.testing.assert_array_equal(load_prompt(tmp_path / f"prompts/seed_{member}.npy"), prompt)


def test_checkpoints_hold_no_frozen_weight(finished: tuple[Path, RunResult]) -> None:
    folder, _ = finished
    prompt_bytes = 2 * tiny_run.LENGTH * tiny_run.CONFIG.embed_dim * 4
    files = tree_bytes(folder / "checkpoints")
    # Prompt and second moments, in two checkpoints each; what orbax adds is 5 kB a checkpoint.
    assert sum(map(len, files.values())) < 4 * (2 * prompt_bytes + 8_000)
    frozen = [p.shape for p in jax.tree.leaves(_frozen())]
    for kind in ("last", "best"):
        found = train_state.read_latest(folder / "checkpoints" / kind)
        assert found is not None
        for name, leaf in found[1].items():
            assert name == "step" or "prompt_PD" in name or leaf.size <= 2, name
            assert leaf.shape not in frozen and leaf.shape[1:] not in frozen


def _frozen() -> dict[str, Any]:
    model = load_model(str(tiny_run.model_folder()))
    members = attach_members(experiment("w"), model, labels=tiny_run.LABELS)
    return dict(members.frozen)


def test_training_moves_the_prompt_and_lowers_the_loss(finished: tuple[Path, RunResult]) -> None:
    folder, result = finished
    losses = np.array([r["loss"] for r in measurements(folder) if r["kind"] == "train"])
    assert (losses[-3:].mean(axis=0) < losses[0] - 0.1).all()
    model = load_model(str(tiny_run.model_folder()))
    start = attach_members(experiment("w"), model, labels=tiny_run.LABELS).trainable[PROMPT]
    assert np.abs(result.best_tuned[PROMPT] - start).min() > 0


def test_output_says_what_trains_on_what(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(experiment(tmp_path, {"training.seeds": (0, 1), "data.inputs_length": 14}))
    out = capsys.readouterr().out
    model = load_model(str(tiny_run.model_folder()))
    words = model.vocabulary
    assert words is not None
    lengths = [len(words.encode(row["inputs"])) + 1 for row in tiny_run.rows(48, seed=1)]
    cut = sum(length > 14 for length in lengths)
    assert 0 < cut < 48
    assert "2 x 80 parameters train" in out
    assert "\nprompt_tuning by " in out
    assert f"48 examples, inputs of {np.mean(lengths):.0f} tokens" in out
    assert f"{cut} inputs ({100 * cut / 48:.1f} %) cut to 14 tokens" in out
    assert "12 steps of 4 examples: 1.0 epochs" in out
    assert "seed_0: best accuracy" in out and "seed_1: best accuracy" in out


def test_a_finished_run_says_so_and_stays_as_it_is(
    finished: tuple[Path, RunResult], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, result = finished
    before = _times_and_bytes(folder)
    again = train(experiment(folder, {"training.seeds": (0, 1)}))
    assert _times_and_bytes(folder) == before
    assert again.finished and again.step == 12 and again.best == result.best
    np.testing.assert_array_equal(again.best_tuned[PROMPT], result.best_tuned[PROMPT])
    assert "the run is finished" in capsys.readouterr().out


def _times_and_bytes(folder: Path) -> dict[str, Any]:
    files = tree_bytes(folder)
    return {name: ((folder / name).stat().st_mtime_ns, data) for name, data in files.items()}


def test_curves_and_results_are_made_up_for(
    tmp_path: Path, finished: tuple[Path, RunResult]
) -> None:
    """A kill between the last checkpoint and the results."""
    changes = {"training.seeds": (0, 1), "training.steps": 3}
    train(experiment(tmp_path, changes), quiet=True)
    expected = (tmp_path / "results.json").read_bytes()
    (tmp_path / "results.json").unlink()
    (tmp_path / "curves.png").unlink()
    train(experiment(tmp_path, changes), quiet=True)
    assert (tmp_path / "results.json").read_bytes() == expected
    assert (tmp_path / "curves.png").is_file()


def _events(monkeypatch: pytest.MonkeyPatch, at: Callable[[int, str], None]) -> None:
    """Calls ``at(number, name)`` before whatever a run does to the world or to its state."""
    count = 0

    def announce(name: str) -> None:
        nonlocal count
        count += 1
        at(count, name)

    def watch(owner: Any, attribute: str) -> None:
        real = getattr(owner, attribute)

        def watched(*args: Any, **kwargs: Any) -> Any:
            announce(attribute)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, attribute, watched)

    for owner, attribute in (
        (train_state, "save"),
        (run_folder, "save_prompt"),
        (run_folder, "write_json"),
        (RunLog, "log_train"),
        (RunLog, "log_eval"),
    ):
        watch(owner, attribute)
    build_step = build.build_step

    def with_watched_step(*args: Any, **options: Any) -> Any:
        state, step, rates = build_step(*args, **options)

        def watched(*arguments: Any) -> Any:
            announce("step")
            return step(*arguments)

        return state, watched, rates

    monkeypatch.setattr(build, "build_step", with_watched_step)


def _points(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    names: list[str] = []
    with monkeypatch.context() as patch:
        _events(patch, lambda number, name: names.append(name))
        train(experiment(folder, INTERRUPTED), quiet=True)
    return names


def _kill_at(monkeypatch: pytest.MonkeyPatch, folder: Path, point: int) -> None:
    def kill(number: int, name: str) -> None:
        if number == point:
            raise Killed

    with monkeypatch.context() as patch:
        _events(patch, kill)
        with pytest.raises(Killed):
            train(experiment(folder, INTERRUPTED), quiet=True)


def _signal_in(number: signal.Signals, *, step: int, folder: Path) -> Callable[[int, str], None]:
    """Sends this process a signal while it computes a step, counted from the run's start."""
    saved = train_state.read_latest(folder / "checkpoints/last")
    left = step - (saved[0] if saved else 0)

    def interrupt(_: int, name: str) -> None:
        nonlocal left
        left -= name == "step"
        if name == "step" and left == 0:
            os.kill(os.getpid(), number)

    return interrupt


def test_killed_anywhere_and_continued_it_is_the_same_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: dict[str, Any],
) -> None:
    names = _points(monkeypatch, tmp_path / "points")
    assert outcome(tmp_path / "points") == uninterrupted
    assert names.count("step") == 8 and names.count("save_prompt") >= 4
    # The last event of each kind that a real run adds to test_loop.py, and a step in the middle.
    last_of_kind = {name: number for number, name in enumerate(names, start=1)}
    middle = [number for number, name in enumerate(names, start=1) if name == "step"][4]
    last = [last_of_kind[name] for name in ("save", "save_prompt", "write_json")]
    for point in sorted({*last, middle}):
        folder = tmp_path / str(point)
        _kill_at(monkeypatch, folder, point)
        assert train(experiment(folder, INTERRUPTED), quiet=True).finished
        assert outcome(folder) == uninterrupted, f"killed before {names[point - 1]} ({point})"


def test_killed_again_and_again_it_is_the_same_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for point in (1, 9, 12, 12, 13):
        _kill_at(monkeypatch, tmp_path, point)
    assert train(experiment(tmp_path, INTERRUPTED)).finished
    assert "resuming from step " in capsys.readouterr().out
    assert outcome(tmp_path) == uninterrupted


@pytest.mark.parametrize(
    ("number", "steps"),
    [
        # Not to be divided by save_every; between log lines; after one more.
        (signal.SIGTERM, (1, 2, 5)),
        (signal.SIGINT, (2,)),
    ],
)
def test_a_signal_saves_at_any_step(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: dict[str, Any],
    number: signal.Signals,
    steps: tuple[int, ...],
) -> None:
    handlers = (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    for step in steps:
        with monkeypatch.context() as patch:
            _events(patch, _signal_in(number, step=step, folder=tmp_path))
            result = train(experiment(tmp_path, INTERRUPTED), quiet=True)
        assert (result.finished, result.step) == (False, step)
        saved = train_state.read_latest(tmp_path / "checkpoints/last")
        assert saved is not None and saved[0] == step
        assert not (tmp_path / "results.json").exists()
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    assert train(experiment(tmp_path, INTERRUPTED), quiet=True).finished
    assert outcome(tmp_path) == uninterrupted


@pytest.mark.slow
def test_really_killed_it_is_the_same_run(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "training.steps": 120,
        "training.seeds": (0, 1),
        "training.eval_every": 20,
        "training.save_every": 30,
        "training.log_every": 7,
    }
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train(experiment(whole, changes), quiet=True).finished
    config = tiny_run.write_config(tmp_path / "c.py", experiment(killed, changes))
    process = tiny_run.start("train", config)
    # Its start, imports and compilation, is of any length.
    while process.poll() is None and not (killed / "metrics.jsonl").exists():
        time.sleep(0.01)
    time.sleep(random.Random(0).uniform(0, 0.2))
    process.kill()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, errors
    assert train(experiment(killed, changes), quiet=True).finished
    assert outcome(killed) == outcome(whole)


@pytest.mark.slow
def test_a_terminated_process_saves_and_says_so(tmp_path: Path) -> None:
    changes = {"training.steps": 100_000, "training.save_every": 100_000}
    folder = tmp_path / "run"
    config = tiny_run.write_config(tmp_path / "c.py", experiment(folder, changes))
    process = tiny_run.start("train", config)
    while process.poll() is None and not (folder / "results.json").exists():
        log = folder / "metrics.jsonl"
        if log.exists() and len(log.read_bytes()) > 1000:
            break
        time.sleep(0.05)
    process.terminate()
    out, errors = process.communicate(timeout=120)
    saved = train_state.read_latest(folder / "checkpoints/last")
    assert saved is not None, errors
    assert f"stopped and saved at step {saved[0]}" in out
    assert process.returncode == 128 + signal.SIGTERM


def test_prompts_trained_at_once_equal_prompts_trained_alone(tmp_path: Path) -> None:
    """SGD with a low rate: what multiplies the last digits of gradients, as the signs that are
    Adafactor's first steps do, soon makes two runs of one prompt differ.
    """
    sgd = {"optimizer.name": "sgd", "optimizer.weight_decay": 0.0}
    seeds, rates, inits = (3, 7), (0.03, 0.06), ("uniform", "class_labels")
    together = train(
        experiment(
            tmp_path / "together",
            {
                **sgd,
                "training.seeds": seeds,
                "training.learning_rates": rates,
                "training.inits": inits,
            },
        ),
        quiet=True,
    )
    assert together.names == ("seed_3_lr_0.03_uniform", "seed_7_lr_0.06_class_labels")
    logged = [r for r in measurements(tmp_path / "together") if r["kind"] == "train"]
    assert all(record["learning_rate"] == list(rates) for record in logged)
    alone = train(
        experiment(
            tmp_path / "alone",
            {
                **sgd,
                "training.seeds": seeds[1:],
                "optimizer.learning_rate": rates[1],
                "method.init": inits[1],
            },
        ),
        quiet=True,
    )
    np.testing.assert_allclose(
        _last_prompt(tmp_path / "together")[1], _last_prompt(tmp_path / "alone")[0], atol=1e-6
    )
    ours, theirs = together.best[1], alone.best[0]
    assert ours is not None and theirs is not None
    assert (ours.step, ours.metrics) == (theirs.step, theirs.metrics)
    file = tmp_path / "together/prompts" / f"{together.names[1]}.safetensors"
    metadata = load_prompt_with_metadata(file)[1]
    assert (metadata.seed, metadata.init) == (seeds[1], inits[1])


def _last_prompt(folder: Path) -> np.ndarray:
    found = train_state.read_latest(folder / "checkpoints/last")
    assert found is not None
    return found[1][f"trainable/{PROMPT}"]


def test_accumulated_gradients_are_the_whole_batch_s(tmp_path: Path) -> None:
    """SGD, whose step is proportional to the gradient; Adafactor hides its size."""
    sgd = {"model.dropout_rate": 0.0, "optimizer.name": "sgd", "optimizer.learning_rate": 0.5}
    train(experiment(tmp_path / "whole", sgd), quiet=True)
    parts = {**sgd, "training.gradient_accumulation": 2}
    train(experiment(tmp_path / "parts", parts), quiet=True)
    whole, accumulated = _last_prompt(tmp_path / "whole"), _last_prompt(tmp_path / "parts")
    np.testing.assert_allclose(accumulated, whole, atol=2e-6)
    losses = [
        [r["loss"] for r in measurements(tmp_path / name) if r["kind"] == "train"]
        for name in ("whole", "parts")
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
