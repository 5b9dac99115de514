"""Checks of ``check_gpu``: a run that was killed resumes, and ends like an uninterrupted one.

python _check_gpu_resume.py EXPERIMENT.json trains; the check kills such a process.
"""

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
from _check_gpu_ops import relative_error
from _check_gpu_report import Report
from _check_gpu_speed import SMALL_T5, T5_SMALL, add_presets

from prompt_tuning_jax.checkpoints import train_state
from prompt_tuning_jax.checkpoints.hub import ASSETS
from prompt_tuning_jax.config.experiment import Data, Experiment, Model, Training
from prompt_tuning_jax.config.overrides import from_json, to_json
from prompt_tuning_jax.methods import PromptTuning
from prompt_tuning_jax.training.logging import METRICS_FILE, read_metrics
from prompt_tuning_jax.training.run import RunResult, train

_MOST = 1e-3  # relative error of what was trained
_START_SECONDS = 120.0  # until a run has saved something
_COLORS = ("blue", "green", "red")
_WORDS = [
    "air",
    "bread",
    "child",
    "door",
    "earth",
    "fire",
    "garden",
    "hill",
    "island",
    "king",
    "letter",
    "moon",
    "night",
    "river",
]


def run(report: Report) -> None:
    """Trains once without interruption, and with each signal in between."""
    signals = [signal.SIGTERM] if report.options.small else [signal.SIGKILL, signal.SIGTERM]
    with tempfile.TemporaryDirectory(prefix="check_gpu_") as scratch, report.guarded("resume"):
        folder = Path(scratch)
        whole = _experiment(report, folder, "whole")
        uninterrupted = _train(whole)
        processes = [(number, *_start(report, folder, number.name)) for number in signals]
        try:
            # All end before any resumes: they would finish meanwhile.
            steps = {number: _end(process, of, number) for number, of, process in processes}
            for number, experiment, _ in processes:
                with report.guarded(f"resume after {number.name}"):
                    step = steps[number]
                    resumed = _train(experiment)
                    passed, said = _compared(uninterrupted, resumed)
                    said = f"from step {step} of {experiment.training.steps}: {said}"
                    report.check(f"resume after {number.name}", passed, said)
        finally:
            for _, _, process in processes:
                process.kill()
                process.wait()


def _experiment(report: Report, folder: Path, name: str) -> Experiment:
    small = report.options.small
    files = {"train": folder / "train.jsonl", "eval": folder / "eval.jsonl"}
    for seed, file in enumerate(files.values()):
        file.write_text(_lines(48, seed=seed), encoding="utf-8")
    return Experiment(
        model=Model(
            name_or_path=SMALL_T5 if small else T5_SMALL,
            random_weights=True,
            vocabulary=str(ASSETS / "tiny" / "spiece.model"),
            dropout_rate=0.0 if small else 0.1,
        ),
        method=PromptTuning(length=5 if small else 100, init="uniform"),
        data=Data(
            task="",
            inputs_length=16 if small else 64,
            targets_length=4,
            cache=False,
            **{split: str(file) for split, file in files.items()},  # type: ignore[arg-type]
        ),
        training=Training(
            steps=40 if small else 200,
            batch_size=4 if small else 16,
            save_every=4 if small else 20,
            log_every=4 if small else 20,
            eval_every=20 if small else 100,
            workdir=str(folder / name),
        ),
    )


def _lines(number: int, *, seed: int) -> str:
    """Returns examples whose label is the color in the text."""
    draw = random.Random(seed)
    lines = []
    for _ in range(number):
        color = draw.choice(_COLORS)
        text = " ".join([*draw.choices(_WORDS, k=3), color, draw.choice(_WORDS)])
        lines.append(json.dumps({"inputs": text, "targets": color}) + "\n")
    return "".join(lines)


def _train(experiment: Experiment) -> RunResult:
    # Not in TF32, or the rounding of two programs for the same step might differ more.
    with jax.default_matmul_precision("highest"):
        return train(experiment, quiet=True)


def _start(report: Report, folder: Path, name: str) -> tuple[Experiment, "subprocess.Popen[bytes]"]:
    experiment = _experiment(report, folder, name)
    file = folder / f"{name}.json"
    file.write_text(to_json(experiment), encoding="utf-8")
    command = [sys.executable, str(Path(__file__).resolve()), str(file)]
    return experiment, subprocess.Popen(command, stdout=sys.stderr)


def _end(process: "subprocess.Popen[bytes]", experiment: Experiment, number: signal.Signals) -> int:
    """Sends the signal as soon as the run has saved a state; returns the step to resume from."""
    last = Path(experiment.training.workdir) / train_state.LAST
    end = time.monotonic() + _START_SECONDS
    while train_state.latest_step(last) <= 0 and process.poll() is None:
        if time.monotonic() > end:
            raise RuntimeError(f"the run saved nothing within {_START_SECONDS:.0f} s")
        time.sleep(0.02)
    process.send_signal(number)
    status = process.wait(timeout=60)
    expected = -number if number == signal.SIGKILL else 128 + number
    if status != expected:
        raise RuntimeError(f"the run ended with status {status} instead of {expected}")
    return train_state.latest_step(last)


def _compared(whole: RunResult, resumed: RunResult) -> tuple[bool, str]:
    """Compares the trained arrays and all metrics, except those of the machine's speed."""
    errors = [
        relative_error(resumed.best_tuned[name], array) for name, array in whole.best_tuned.items()
    ]
    losses = [_losses(result.workdir) for result in (whole, resumed)]
    if len(losses[0]) != len(losses[1]) or not resumed.finished:
        return False, f"{len(losses[1])} records of metrics instead of {len(losses[0])}"
    errors.append(relative_error(*losses[::-1]))
    equal = "bit for bit" if max(errors) == 0 else f"with an error of {max(errors):.1e}"
    return max(errors) <= _MOST, f"ends like an uninterrupted run, {equal} (at most {_MOST:.0e})"


def _losses(workdir: Path) -> list[float]:
    """Returns the losses of all members in all records."""
    records = read_metrics(workdir / METRICS_FILE)
    return [float(loss) for record in records for loss in record.get("loss", ())]


def main() -> int:
    """Trains the experiment of a file; returns the status of a process that a signal stopped."""
    add_presets()
    experiment = from_json(Path(sys.argv[1]).read_bytes())
    stopped_by = _train(experiment).stopped_by
    return 128 + stopped_by if stopped_by else 0


if __name__ == "__main__":
    sys.exit(main())
