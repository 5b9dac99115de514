"""The loop alone, on a step that only counts: which state is best, when it ends, what it refuses.

Nothing is compiled, so that each test is a fraction of a second.
"""

import dataclasses
import json
import math
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.checkpoints import train_state
from prompt_tuning_jax.checkpoints.train_state import BEST, LAST
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.training.logging import RunLog, read_metrics
from prompt_tuning_jax.training.loop import Loop, LoopResult
from prompt_tuning_jax.training.step import StepMetrics, TrainState

NAN = math.nan
# By member and evaluation; at steps 2, 4, 6, ...
Scores = Sequence[Sequence[float]]


class Killed(BaseException):
    pass


def start(members: int) -> TrainState:
    return TrainState(
        step=jnp.int32(0),
        trainable={"p": jnp.zeros((members, 3))},
        opt_state={"v": jnp.ones((members, 3))},
    )


def step_of(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, StepMetrics]:
    """Each state is a function of the step, so that arrays say when they were."""
    number = int(state.step) + 1
    members = len(state.trainable["p"])
    loss_E = jnp.full(members, 1 / number, jnp.float32)
    metrics = StepMetrics(
        loss_E=loss_E, accuracy_E=loss_E, gradient_norm_E=loss_E, update_norm_E=loss_E
    )
    trainable = {"p": state.trainable["p"] + jnp.arange(members)[:, None] + 1}
    return TrainState(
        step=jnp.int32(number), trainable=trainable, opt_state=state.opt_state
    ), metrics


def loop(folder: Path, scores: Scores, told: list[Any] | None = None, **changes: Any) -> Loop:
    """Evaluates every two steps, and saves every three."""
    members = len(scores)

    def batches(begin: int, stop: int) -> Iterator[dict[str, np.ndarray]]:
        for _ in range(begin, stop):
            yield {
                "inputs": np.zeros((members, 1, 1), np.int32),
                "targets": np.zeros((members, 1, 1), np.int32),
            }

    def evaluate(trainable: Mapping[str, Any]) -> list[dict[str, float]]:
        number = int(trainable["p"][0, 0]) // 2 - 1
        return [{"m": float(own[number]), "other": 1.0} for own in scores]

    def on_best(improved: list[int], trainable: Any, bests: Any) -> None:
        if told is not None:
            told.append((improved, [best.step for best in bests]))

    fields: dict[str, Any] = {
        "train_step": step_of,
        "frozen": {},
        "batches": batches,
        "evaluate": evaluate,
        "on_best": on_best,
        "workdir": folder,
        "fingerprint": "f",
        "data": {"training data": "t", "evaluation data": "e"},
        "names": tuple(f"seed_{i}" for i in range(members)),
        "learning_rates": lambda step: np.ones(members, np.float32),
        "best_by": "m",
        "direction": "max",
        "steps": 2 * len(scores[0]),
        "eval_every": 2,
        "save_every": 3,
        "log_every": 5,
        "batch_size": 1,
        "quiet": True,
    }
    return Loop(**{**fields, **changes})


def run(folder: Path, scores: Scores, told: list[Any] | None = None, **changes: Any) -> LoopResult:
    return loop(folder, scores, told, **changes).run(start(len(scores)))


def best_steps(result: LoopResult) -> list[int | None]:
    """Of each member, checked against the arrays that are kept."""
    steps = [own.step if own else None for own in result.best]
    for member, step in enumerate(steps):
        assert result.best_tuned["p"][member, 0] == (step or 0) * (member + 1)
    return steps


def left_over(folder: Path) -> dict[str, Any]:
    """All that must not depend on interruptions."""
    found: dict[str, Any] = {}
    for name in (LAST, BEST):
        saved = train_state.read_latest(folder / name)
        assert saved is not None
        found[name] = (saved[0], {k: v.tobytes() for k, v in saved[1].items()}, saved[2])
    found["metrics"] = [
        {k: v for k, v in record.items() if not k.endswith("_per_second")}
        for record in (json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines())
    ]
    return found


@pytest.mark.parametrize(
    ("direction", "scores", "expected"),
    [
        ("max", [[NAN, 5, 21.9, 20]], [6]),
        ("max", [[NAN, NAN, -3, NAN]], [6]),
        ("max", [[7, NAN, 8, NAN]], [6]),
        ("max", [[7, NAN, 7, 6]], [2]),
        ("min", [[NAN, 5, 21.9, 20]], [4]),
        ("min", [[100, 80, NAN, 85]], [4]),
        ("min", [[NAN, NAN, NAN, 9]], [8]),
        ("max", [[NAN, 5, 4, 3], [1, NAN, 2, NAN]], [4, 6]),
        # Of no number at all the last is kept, and is the best of nothing.
        ("max", [[NAN, NAN, NAN, NAN]], [8]),
        ("min", [[math.inf, NAN, -math.inf, NAN]], [8]),
    ],
)
def test_which_state_is_best(
    tmp_path: Path, direction: str, scores: Scores, expected: list[int]
) -> None:
    assert best_steps(run(tmp_path, scores, direction=direction)) == expected


def test_nan_is_null_in_files_and_nan_when_read(tmp_path: Path) -> None:
    run(tmp_path, [[NAN, NAN], [3, NAN]])
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and '"m": null' in text
    for file in (tmp_path / "checkpoints").rglob("*METADATA"):
        assert b"NaN" not in file.read_bytes()
    saved = train_state.read_latest(tmp_path / BEST)
    assert saved is not None and saved[2]["best"][0]["metrics"] == {"m": None, "other": 1.0}
    result = run(tmp_path, [[NAN, NAN, 1], [3, NAN, NAN]])
    assert best_steps(result) == [6, 2]


def test_evaluations_without_a_number_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, [[NAN, 2, NAN], [NAN, NAN, 3]], quiet=False)
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert len(notes) == 1 and "m at step 2 is not a number" in notes[0]


@pytest.mark.parametrize(
    ("patience", "scores", "step"),
    [
        (0, [[5, 4, 3, 2, 1, 0]], 12),
        (2, [[5, 4, 3, 2, 1, 0]], 6),
        (2, [[1, 2, 2, 2, 9, 9]], 8),
        (3, [[1, 2, 2, 2, 9, 8]], 12),
        # One member that improves is enough, at whatever evaluation it is.
        (2, [[5, 4, 3, 2, 1, 0], [1, 1, 2, 2, 3, 3]], 12),
        (2, [[5, 4, 3, 2, 1, 0], [1, 1, 2, 2, 2, 3]], 10),
        # nan is no improvement, not even the first; a number after it is.
        (2, [[NAN, NAN, NAN, 2, 1, 0]], 4),
        (3, [[NAN, NAN, 1, NAN, NAN, NAN]], 12),
    ],
)
def test_patience_ends_a_run(tmp_path: Path, patience: int, scores: Scores, step: int) -> None:
    result = run(tmp_path, scores, patience=patience)
    assert (result.step, result.finished, result.stopped_early) == (step, True, step < 12)
    evaluated = [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "eval"]
    assert evaluated == list(range(2, step + 1, 2))
    # Asked again it has nothing to do.
    again = run(tmp_path, scores, patience=patience)
    assert (again.step, again.finished, again.stopped_early) == (step, True, step < 12)
    assert again.best == result.best or any(NAN in x for x in scores)


def test_with_more_patience_a_stopped_run_goes_on(tmp_path: Path) -> None:
    scores = [[5, 4, 3, 6, 5, 4, 3, 7]]
    assert run(tmp_path / "a", scores, patience=2).step == 6
    assert run(tmp_path / "a", scores, patience=3).step == 14
    assert run(tmp_path / "a", scores, patience=0).step == 16
    run(tmp_path / "b", scores)
    assert left_over(tmp_path / "a") == left_over(tmp_path / "b")


def kill_at(monkeypatch: pytest.MonkeyPatch, point: int, what: Callable[[], Any]) -> bool:
    """Whether it was killed before the ``point``-th thing that it writes."""
    count = 0

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == point:
                raise Killed
            return real(*args, **kwargs)

        return counted

    with monkeypatch.context() as patch:
        for owner, name in (
            (train_state, "save"),
            (RunLog, "log_eval"),
            (RunLog, "log_train"),
            (Loop, "_report_best"),
        ):
            patch.setattr(owner, name, watched(getattr(owner, name)))
        try:
            what()
        except Killed:
            return True
    return False


def test_killed_anywhere_it_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = [[NAN, NAN, 5, NAN, NAN, 9], [NAN, 1, 0, NAN, 1, 2]]
    result = run(tmp_path / "whole", scores, patience=2)
    assert result.stopped_early and result.step == 10
    expected = left_over(tmp_path / "whole")
    kills = 0
    for point in (2, 5, 7, 9, 11, 13, 14, 15, 17, 18, 20):
        folder = tmp_path / str(point)
        kills += kill_at(monkeypatch, point, lambda f=folder: run(f, scores, patience=2))
        if point % 2:  # once more a little later
            kills += kill_at(monkeypatch, 4, lambda f=folder: run(f, scores, patience=2))
        again = run(folder, scores, patience=2)
        assert left_over(folder) == expected, point
        assert again.stopped_early
    assert kills >= 12


def test_more_steps_are_as_if_asked_for_at_once(tmp_path: Path) -> None:
    scores = [[1, 5, 2, 3, 9, 4]]
    run(tmp_path / "a", scores, steps=6)
    result = run(tmp_path / "a", scores, steps=12)
    assert result.step == 12 and best_steps(result) == [10]
    run(tmp_path / "b", scores, steps=12)
    # The log line of the first end is there beside those that both have.
    a, b = left_over(tmp_path / "a"), left_over(tmp_path / "b")
    assert (a[LAST], a[BEST]) == (b[LAST], b[BEST])
    assert [r for r in a["metrics"] if r["kind"] == "eval"] == [
        r for r in b["metrics"] if r["kind"] == "eval"
    ]


@pytest.mark.parametrize("changed", ["training data", "evaluation data"])
def test_other_data_is_refused(tmp_path: Path, changed: str) -> None:
    run(tmp_path, [[1, 2, 3]], steps=4)
    before = left_over(tmp_path)
    data = {"training data": "t", "evaluation data": "e", changed: "x"}
    with pytest.raises(UserError, match=f"holds a run on other {changed}: it has changed"):
        run(tmp_path, [[1, 2, 3]], data=data)
    assert left_over(tmp_path) == before
    with pytest.raises(UserError, match="another frozen model"):
        run(tmp_path, [[1, 2, 3]], fingerprint="g")


def damage(folder: Path, step: int, how: str) -> None:
    files = sorted(f for f in (folder / str(step)).rglob("*") if f.is_file())
    if how == "emptied":
        shutil.rmtree(folder / str(step))
        (folder / str(step)).mkdir()
    elif how == "metadata gone":
        (folder / str(step) / "_CHECKPOINT_METADATA").unlink()
    elif how == "metadata nonsense":
        path = folder / str(step) / "_CHECKPOINT_METADATA"
        value = json.loads(path.read_text())
        value["custom_metadata"]["extra"]["pending"] = "nonsense"
        path.write_text(json.dumps(value))
    else:
        for file in files:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("how", ["cut", "emptied", "metadata gone", "metadata nonsense"])
def test_a_damaged_last_state_is_replaced_by_the_one_before_and_that_is_said(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    scores = [[1, 5, 2, 3, 9, 4]]
    run(tmp_path / "whole", scores)
    folder = tmp_path / "damaged"
    run(folder, scores, steps=9)
    damage(folder / LAST, 9, how)
    result = run(folder, scores)
    (warning,) = [r.getMessage() for r in caplog.records if "damaged" in r.getMessage()]
    assert "step 9" in warning and "of step 6" in warning and "\n" not in warning
    assert best_steps(result) == [10]
    whole, mended = left_over(tmp_path / "whole"), left_over(folder)
    # The evaluation at the end of nine steps is not among those of twelve.
    assert whole[LAST][:2] == mended[LAST][:2] and whole[BEST][:2] == mended[BEST][:2]
    assert sorted(p.name for p in (folder / LAST).iterdir()) == ["12", "9"]
    assert "Traceback" not in "".join(capfd.readouterr())


def test_where_no_last_state_is_whole_the_advice_is_true(tmp_path: Path) -> None:
    scores = [[1, 5, 2, 3, 9, 4]]
    expected = run(tmp_path / "whole", scores)
    folder = tmp_path / "damaged"
    run(folder, scores, steps=9)
    for step in (9, 6):
        damage(folder / LAST, step, "cut")
    with pytest.raises(UserError, match="is damaged") as caught:
        run(folder, scores)
    advice = f"remove {folder / LAST} to train again from the start"
    assert advice in str(caught.value) and "\n" not in str(caught.value)
    shutil.rmtree(folder / LAST)
    assert best_steps(run(folder, scores)) == best_steps(expected)
    assert left_over(folder)[LAST][:2] == left_over(tmp_path / "whole")[LAST][:2]


@pytest.mark.parametrize("how", ["gone", "cut"])
def test_where_the_best_is_lost_the_run_is_refused(tmp_path: Path, how: str) -> None:
    scores = [[1, 5, 2, 3, 9, 4]]
    run(tmp_path, scores, steps=9)
    if how == "gone":
        shutil.rmtree(tmp_path / BEST)
    else:
        for step in (int(path.name) for path in list((tmp_path / BEST).iterdir())):
            damage(tmp_path / BEST, step, "cut")
    with pytest.raises(UserError, match=r"best.* is (gone|damaged)") as caught:
        run(tmp_path, scores)
    remedy = f"remove {tmp_path / 'checkpoints'} to train again from the start"
    assert remedy in str(caught.value) and "\n" not in str(caught.value)
    shutil.rmtree(tmp_path / "checkpoints")
    assert best_steps(run(tmp_path, scores)) == [10]


def test_a_damaged_best_is_replaced_by_the_one_before_and_not_told_of_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scores = [[1, 5, 2, 6, 3, 4]]
    run(tmp_path, scores, steps=9)
    damage(tmp_path / BEST, 8, "cut")
    told: list[Any] = []
    result = run(tmp_path, scores, told)
    assert "of step 4" in caplog.text and best_steps(result) == [4] and told == []


def test_flipped_bits_are_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Wherever they are: what is restored is a state that was saved, bit for bit."""
    draw = random.Random(0)
    state = {
        step: dataclasses.replace(start(2), trainable={"p": jnp.asarray(_noise(step))})
        for step in (1, 2)
    }
    for step, one in state.items():
        train_state.save(tmp_path / "whole", step, one, {"step": step, "best": [0.25]})
    files = sorted(f for f in (tmp_path / "whole/2").rglob("*") if f.is_file())
    noticed = 0
    for file in files:
        for _ in range(4):
            folder = tmp_path / "flipped"
            shutil.copytree(tmp_path / "whole", folder)
            flipped = folder / file.relative_to(tmp_path / "whole")
            content = bytearray(flipped.read_bytes())
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            flipped.write_bytes(content)
            caplog.clear()
            found = train_state.restore_latest(folder, state[1])
            shutil.rmtree(folder)
            assert found is not None
            step, restored, extra = found
            assert extra == {"step": step, "best": [0.25]}
            assert np.asarray(restored.trainable["p"]).tobytes() == _noise(step).tobytes()
            assert (step == 1) == ("damaged" in caplog.text)
            noticed += step == 1
    assert noticed > len(files)


def _noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, 40, 8), np.float32)


@pytest.mark.parametrize("how", ["removed", "renamed", "replaced"])
def test_a_working_directory_that_goes_away_ends_the_run_at_once(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "run"
    steps: list[int] = []

    def step(state: TrainState, frozen: Any, batch: Any) -> Any:
        steps.append(int(state.step) + 1)
        if len(steps) == 4:
            if how == "removed":
                shutil.rmtree(folder)
            else:
                folder.rename(tmp_path / "elsewhere")
            if how == "replaced":
                folder.mkdir()
        return step_of(state, frozen, batch)

    with pytest.raises(UserError, match="has been removed or renamed") as caught:
        run(folder, [[1.0] * 50], train_step=step)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert len(steps) <= 6  # the next save
    assert not folder.exists() or not list(folder.iterdir())


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As a full disk: what would be longer cannot be written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 60, 250, 400])
def test_a_full_disk_is_one_line_and_the_run_goes_on_from_it(
    tmp_path: Path, size: int, capfd: pytest.CaptureFixture[str]
) -> None:
    scores = [[1, 5, 2, 3, 9, 4]]
    run(tmp_path / "whole", scores)
    folder = tmp_path / "full"
    run(folder, scores, steps=1, log_every=100)
    shutil.rmtree(folder)
    with files_of_at_most(size), pytest.raises(UserError, match=r"cannot (be )?writ") as caught:
        run(folder, scores)
    assert "\n" not in str(caught.value)
    run(folder, scores)
    assert left_over(folder) == left_over(tmp_path / "whole")
    assert "Traceback" not in "".join(capfd.readouterr())


def test_what_a_killed_run_was_writing_is_removed_by_the_next(tmp_path: Path) -> None:
    ended = 2**22 + 1  # a number that Linux gives to no process
    kept = [f".x.{os.getppid()}.tmp", ".notes.tmp", "x.5.tmp", f".y.{ended}.tmp.txt"]
    gone = [f".metrics.jsonl.{ended}.tmp", f".a.{os.getpid()}.tmp"]
    (tmp_path / "prompts").mkdir()
    for name in (*kept, *gone):
        (tmp_path / name).write_text("x")
        (tmp_path / "prompts" / name).write_text("x")
    (tmp_path / f".folder.{ended}.tmp").mkdir()
    (tmp_path / f".folder.{ended}.tmp" / "file").write_text("x")
    outside = tmp_path.parent / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "file").write_text("x")
    (tmp_path / f".link.{ended}.tmp").symlink_to(outside)
    run(tmp_path, [[1, 2]])
    for folder in (tmp_path, tmp_path / "prompts"):
        assert {p.name for p in folder.iterdir() if ".tmp" in p.name} == set(kept)
    assert (outside / "file").exists()
