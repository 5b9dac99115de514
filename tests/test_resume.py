"""What may change while a run goes on, what is refused, and what is evaluated by a loss."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints import run_folder, train_state
from prompt_tuning_jax.checkpoints.load import load_model
from prompt_tuning_jax.config.config_file import saved_config
from prompt_tuning_jax.data.batching import task_data
from prompt_tuning_jax.data.batching.loader import eval_batches
from prompt_tuning_jax.data.tasks.metrics import Metric
from prompt_tuning_jax.data.tasks.task import Source, Task, as_mixture
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference import evaluation
from prompt_tuning_jax.inference.evaluation import evaluate
from prompt_tuning_jax.inference.predictor import evaluate_members
from prompt_tuning_jax.inference.setup import attach_members, vocabulary_of
from prompt_tuning_jax.training.resume import claim, require_run
from prompt_tuning_jax.training.run import RunResult, train
from tests import tiny_run
from tests.tiny_run import experiment, measurements

BASE: dict[str, Any] = {"training.steps": 4, "training.eval_every": 2, "training.save_every": 2}


def claimed(folder: Path, changes: dict[str, Any] | None = None, *, done: int = 4) -> None:
    """A run's folder as it is after so many steps, without training."""
    claim(folder, experiment(folder, BASE | (changes or {})))
    if done:
        train_state.save(folder / train_state.LAST, done, {"p": np.zeros(2)}, {})
    run_folder.write_json(
        folder / run_folder.RESULTS, {"best": {}, "step": done, "stopped_early": False}
    )


LINEAR = {"optimizer.schedule": "linear"}
RSQRT = {"optimizer.schedule": "rsqrt", "optimizer.warmup_steps": 2}
COSINE = {"optimizer.schedule": "cosine", "optimizer.warmup_steps": 3}


@pytest.mark.parametrize(
    ("before", "after", "done"),
    [
        ({}, {"training.steps": 9}, 4),
        ({}, {"training.gradient_accumulation": 2}, 4),
        ({}, {"training.patience": 3}, 4),
        ({"training.patience": 3}, {"training.patience": 0, "training.steps": 6}, 4),
        (RSQRT, RSQRT | {"training.steps": 9}, 4),
        (LINEAR, LINEAR | {"training.steps": 9, "optimizer.decay_steps": 4}, 4),
        (LINEAR, LINEAR | {"training.steps": 9}, 0),
        # At its height as long as it is not past the warm-up.
        (COSINE, COSINE | {"training.steps": 9}, 3),
    ],
)
def test_what_may_change_is_kept(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any], done: int
) -> None:
    claimed(tmp_path, before, done=done)
    wanted = experiment(tmp_path, BASE | after)
    claim(tmp_path, wanted)
    assert saved_config(str(tmp_path)) == wanted
    assert not (tmp_path / "results.json").exists()  # of a shorter run
    with pytest.raises(UserError, match="another config"):  # in a suite, whose scores are kept
        require_run(tmp_path, experiment(tmp_path, BASE | before), exactly=True)


def test_a_file_that_is_gone_is_no_other_config(tmp_path: Path) -> None:
    claimed(tmp_path)
    with pytest.raises(UserError, match=r"nowhere\.jsonl: no such file"):
        train(experiment(tmp_path, BASE | {"data.train": "nowhere.jsonl"}), quiet=True)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            LINEAR,
            LINEAR | {"training.steps": 9},
            r"4 -> 9 would change the .*decay_steps=4 to continue",
        ),
        (
            COSINE | {"optimizer.warmup_steps": 1},
            COSINE | {"optimizer.warmup_steps": 1, "training.steps": 9},
            r"learning rates of the 4 steps already done",
        ),
        (LINEAR, LINEAR | {"optimizer.decay_steps": 9}, "learning rates of the 4 steps"),
        ({}, {"training.steps": 3}, "the run has done 4 steps, and training.steps is 3"),
        ({}, {"training.batch_size": 8}, r"batch_size: 4 -> 8.*seen twice.*gradient_accumulation"),
        ({}, {"training.seeds": (1,)}, r"training\.seeds"),
        ({}, {"optimizer.learning_rate": 0.1, "training.steps": 9}, r"optimizer\.learning_rate"),
        ({}, {"data.labels": ("red", "green", "blue")}, r"data\.labels"),
    ],
)
def test_what_may_not_change_is_refused(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any], message: str
) -> None:
    claimed(tmp_path, before)
    files = tiny_run.tree_bytes(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        train(experiment(tmp_path, BASE | after), quiet=True)
    assert "\n" not in str(caught.value)
    assert tiny_run.tree_bytes(tmp_path) == files


@pytest.mark.parametrize("text", ["", "[]", '{"best": {}}', '{"step": "x", "stopped_early": 1}'])
def test_results_that_are_none_are_one_line(tmp_path: Path, text: str) -> None:
    claimed(tmp_path)
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=r"results\.json") as caught:
        train(experiment(tmp_path, BASE), quiet=True)
    assert "\n" not in str(caught.value)


def test_data_that_has_changed_is_refused_and_named(tmp_path: Path) -> None:
    train_rows, eval_rows = tiny_run.rows(48, seed=1), tiny_run.rows(24, seed=2)
    files = {"train": tmp_path / "train.jsonl", "eval": tmp_path / "eval.jsonl"}

    def write(train_rows: list[Any], eval_rows: list[Any]) -> None:
        tiny_run.write_rows(files["train"], train_rows)
        tiny_run.write_rows(files["eval"], eval_rows)

    def of(steps: int) -> Any:
        data = {f"data.{name}": str(file) for name, file in files.items()}
        return experiment(tmp_path / "run", BASE | data | {"training.steps": steps})

    write(train_rows, eval_rows)
    assert train(of(2), quiet=True).finished
    files_of_run = ("results.json", "experiment.json", "metrics.jsonl")
    kept = [(tmp_path / "run" / name).read_bytes() for name in files_of_run]

    def relabeled(rows: list[Any]) -> list[Any]:
        other = "green" if rows[5]["targets"] != "green" else "blue"
        return [*rows[:5], {**rows[5], "targets": other}, *rows[6:]]

    for changed, what in (
        ((relabeled(train_rows), eval_rows), "training data"),
        ((train_rows[:-1], eval_rows), "training data"),
        ((train_rows, relabeled(eval_rows)), "evaluation data"),
        ((train_rows, eval_rows[1:]), "evaluation data"),
        # The order is part of it: which example is seen when.
        ((train_rows[::-1], eval_rows), "training data"),
    ):
        write(*changed)
        with pytest.raises(UserError, match=f"holds a run on other {what}: it has changed"):
            train(of(4), quiet=True)
        assert [(tmp_path / "run" / name).read_bytes() for name in files_of_run] == kept
    # Written anew with the same content it is the same data, and the run goes on.
    write(train_rows, eval_rows)
    files["train"].write_text(files["train"].read_text().replace("}\n", " }\n\n"))
    result = train(of(4), quiet=True)
    assert (result.step, result.finished) == (4, True)
    assert json.loads((tmp_path / "run/results.json").read_text())["step"] == 4


def test_patience_is_said_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Nothing changes at a rate of 0, so that the first evaluation is the best.
    changes = {"optimizer.learning_rate": 0.0, "optimizer.weight_decay": 0.0}
    of = experiment(tmp_path, BASE | changes | {"training.steps": 40, "training.patience": 2})
    result = train(of)
    assert (result.step, result.finished, result.stopped_early) == (6, True, True)
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["step"], results["stopped_early"]) == (6, True)
    assert "stopped early at step 6" in capsys.readouterr().out
    again = train(of)
    assert "stopped early at step 6" in capsys.readouterr().out
    assert (again.step, again.stopped_early, again.best) == (6, True, result.best)


@pytest.fixture(scope="module")
def by_loss(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult]:
    """Two members, chosen by the evaluation loss beside the accuracy."""
    folder = tmp_path_factory.mktemp("by_loss") / "run"
    changes = {"training.seeds": (0, 1), "evaluation.best_by": "loss", "training.steps": 6}
    return folder, train(experiment(folder, BASE | changes), quiet=True)


def test_the_evaluation_loss_is_that_of_training(
    by_loss: tuple[Path, RunResult],
) -> None:
    folder, result = by_loss
    of = saved_config(str(folder))
    assert of is not None
    evaluated = [r["metrics"] for r in measurements(folder) if r["kind"] == "eval"]
    for member, best in enumerate(result.best):
        assert best is not None
        losses = [one[member]["loss"] for one in evaluated]
        assert best.metrics["loss"] == min(losses) and "accuracy" in best.metrics
    # By hand, a batch of another size.
    model = load_model(str(tiny_run.model_folder()))
    data = task_data.build_data(of, vocabulary_of(model), training=False)
    members = attach_members(of, model, labels=data.labels)
    (examples,) = data.evaluation.values()
    for member, best in enumerate(result.best):
        assert best is not None
        own = {name: jnp.asarray(x[member]) for name, x in result.best_tuned.items()}
        attached = param_tree.merge(members.graphdef, {**members.frozen, **own})
        logits_of = jax.jit(attached)
        total = tokens = 0.0
        for batch in eval_batches(examples, batch_size=5):
            logits = logits_of(batch["inputs"], batch["targets"])
            targets = batch["targets"]
            log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
            each = np.take_along_axis(np.asarray(log_probs), targets[..., None], axis=-1)[..., 0]
            total -= each[targets != 0].sum()
            tokens += (targets != 0).sum()
        assert best.metrics["loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_eval_shows_the_loss_where_it_is_asked_for(
    by_loss: tuple[Path, RunResult],
) -> None:
    folder, result = by_loss
    of = experiment("", {"evaluation.best_by": "loss"})
    scores = evaluate(of, prompts=[str(folder)])
    for best, own in zip(result.best, scores.per_prompt, strict=True):
        assert best is not None and own["loss"] == pytest.approx(best.metrics["loss"], rel=1e-5)
    assert scores.best["loss"] == min(own["loss"] for own in scores.per_prompt)
    plain = evaluate(experiment(""), prompts=[str(folder)])
    assert "loss" not in plain.per_prompt[0]  # it takes another forward


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize(("best_by", "expected"), [("accuracy", 30.0), ("invalid", 30.0)])
def test_nan_is_not_the_best_of_several_prompts_in_any_order(
    by_loss: tuple[Path, RunResult],
    monkeypatch: pytest.MonkeyPatch,
    order: tuple[int, int],
    best_by: str,
    expected: float,
) -> None:
    values = [math.nan, expected]

    def scored(*args: Any, **kwargs: Any) -> Any:
        _, predictions = evaluate_members(*args, **kwargs)
        return [{"accuracy": values[i], "invalid": values[i]} for i in order], predictions

    monkeypatch.setattr(evaluation, "evaluate_members", scored)
    of = experiment("", {"evaluation.best_by": best_by})
    scores = evaluate(of, prompts=[str(by_loss[0])])
    assert scores.best[best_by] == expected


def odd_task(metric: Metric) -> Task:
    rows = tiny_run.rows(8)
    source = Source(
        splits=("train", "validation"),
        rows=lambda split, data_dir: rows,
        fingerprint=lambda split, data_dir: "",
    )
    return Task(name="odd", source=source, labels=tiny_run.LABELS, metrics=(metric,))


@pytest.mark.parametrize(
    ("metric", "changes", "expected"),
    [
        (Metric(name="oddity", fn=lambda t, p: 1.0), {}, None),
        (Metric(name="oddity", fn=lambda t, p: 1.0), {"evaluation.best_mode": "min"}, "min"),
        (Metric(name="oddity", fn=lambda t, p: 1.0, direction="min"), {}, "min"),
        (Metric(name="x", fn=lambda t, p: {"oddity": 1.0}, direction={"oddity": "max"}), {}, "max"),
        (Metric(name="wer", fn=lambda t, p: 1.0), {}, "min"),
        # What a name only suggests the user knows better.
        (Metric(name="wer", fn=lambda t, p: 1.0), {"evaluation.best_mode": "max"}, "max"),
        (Metric(name="oddity", fn=lambda t, p: 1.0), {"evaluation.best_by": "invalid"}, "min"),
        (Metric(name="oddity", fn=lambda t, p: 1.0), {"evaluation.best_by": "loss"}, "min"),
    ],
)
def test_what_is_better_is_asked_for_before_training_where_it_is_not_known(
    monkeypatch: pytest.MonkeyPatch, metric: Metric, changes: dict[str, Any], expected: str | None
) -> None:
    mixture = as_mixture(odd_task(metric))
    monkeypatch.setattr(task_data, "build_mixture", lambda data: mixture)
    of = experiment("", changes)
    of = dataclasses.replace(of, data=dataclasses.replace(of.data, cache=False))
    words = vocabulary_of(load_model(str(tiny_run.model_folder())))
    if expected is None:
        with pytest.raises(UserError, match=r"direction of 'oddity'.*evaluation\.best_mode"):
            task_data.build_data(of, words)
        data = task_data.build_data(of, words, training=False)  # one prompt needs no best
        with pytest.raises(UserError, match="best_mode"):
            data.require_direction()
        return
    data = task_data.build_data(of, words)
    assert data.require_direction() == expected


@pytest.mark.parametrize(("best_by", "mode"), [("accuracy", "min"), ("loss", "max")])
def test_what_a_metric_declares_is_not_turned_round(best_by: str, mode: str) -> None:
    of = experiment("", {"evaluation.best_by": best_by, "evaluation.best_mode": mode})
    words = vocabulary_of(load_model(str(tiny_run.model_folder())))
    with pytest.raises(UserError, match=rf"best_mode is {mode}, but .* of '{best_by}' is better"):
        task_data.build_data(of, words)
