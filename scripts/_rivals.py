"""Runs programs that do the same work in separate processes, one at a time.

A worker reads one JSON object per line from standard input, runs the job that it names, and
answers with one JSON object per line; everything else that it prints goes to standard error.  Only
one worker runs at a time, so that each has the whole machine.
"""

import importlib.metadata
import json
import math
import os
import platform
import resource
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
WORKERS = Path(__file__).resolve().parent
PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers", "peft")
MOST_FAULTS = 100  # pages read back from disk in a job; more mean that the memory was short


class TimeoutExceeded(Exception):
    """A worker has not answered in time, and has been stopped."""


class Worker:
    """A worker process; ``ask`` sends it a job and waits for the answer."""

    def __init__(self, name: str, script: str, *, python: str, threads: int) -> None:
        self.name = name
        self.stopped = False  # it took too long
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM="false")
        environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{environment.get('PYTHONPATH', '')}"
        command = [python, str(WORKERS / script), str(threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, do: str, *, within: float | None = None, **job: Any) -> dict[str, Any]:
        """Returns the worker's answer; exits if the worker has died.

        Raises ``TimeoutExceeded``, and stops the worker, after ``within`` seconds without answer.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **job}) + "\n")
            self.process.stdin.flush()
            if within and not select.select([self.process.stdout], [], [], within)[0]:
                self.process.kill()
                self.stopped = True
                raise TimeoutExceeded
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            sys.exit(f"error: {self.name} exited during the job {do!r}; see its message above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def answer_jobs(jobs: Mapping[str, Any]) -> None:
    """Runs in the worker: answers jobs until standard input ends.

    Every answer has ``faults``, the pages that were read from disk during the job.
    """
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        job = json.loads(line)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        result = jobs[job.pop("do")](**job) or {}
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt - before
        print(json.dumps({**result, "faults": faults}), file=answers, flush=True)


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that matter to a benchmark."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine(*workers: Worker) -> str:
    """Returns a line that names the processor, and the versions of each worker's packages."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    each = []
    for worker in workers:
        named = ", ".join(
            f"{name} {one}" for name, one in worker.ask("versions").items() if name != "faults"
        )
        each.append(f"{worker.name}: {named}")
    return f"{model}, {os.cpu_count()} cores; " + "; ".join(each)


def peaks(jobs: Mapping[str, tuple[Worker, str, Mapping[str, Any]]]) -> dict[str, float]:
    """Returns the peak memory in MB of each job's worker, NaN where that was stopped."""
    return {
        name: math.nan if worker.stopped else worker.ask("memory")["peak_mb"]
        for name, (worker, _, _) in jobs.items()
    }


def peak_memory() -> dict[str, float]:
    """Returns the peak and the current resident memory of this process in MB."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return {
        "peak_mb": int(fields["VmHWM"].split()[0]) / 1000,
        "now_mb": int(fields["VmRSS"].split()[0]) / 1000,
    }


def start_of_both(preset: str, scratch: Path, *, prompt_length: int) -> tuple[Path, Path]:
    """Writes random weights and an initial prompt ``[P, D]`` for both sides; returns the paths."""
    from prompt_tuning_jax import param_tree
    from prompt_tuning_jax.checkpoints.hf.pretrained import write_hf
    from prompt_tuning_jax.checkpoints.load import random_model

    folder, prompt = scratch / "model", scratch / "prompt.npy"
    if not folder.is_dir():
        model = random_model(preset)
        write_hf(folder, model.config, param_tree.split(model)[1], dtype="float32")
        rng = np.random.default_rng(1)
        shape = (prompt_length, model.config.embed_dim)
        np.save(prompt, rng.uniform(-0.5, 0.5, shape).astype(np.float32))
    return folder, prompt


def save_batches(file: Path, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> Path:
    """Writes pairs of inputs ``[B, T]`` and targets ``[B, S]``, of any lengths, to one file."""
    arrays = {}
    for number, (inputs_BT, targets_BS) in enumerate(batches):
        arrays[f"inputs_{number}"] = inputs_BT.astype(np.int32)
        arrays[f"targets_{number}"] = targets_BS.astype(np.int32)
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return file


def read_batches(file: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Reads a file that ``save_batches`` has written."""
    with np.load(file, allow_pickle=False) as arrays:
        count = len(arrays.files) // 2
        return [(arrays[f"inputs_{n}"], arrays[f"targets_{n}"]) for n in range(count)]


def take_turns(
    jobs: Mapping[str, tuple[Worker, str, Mapping[str, Any]]],
    *,
    rounds: int,
    within: float | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Runs each job ``rounds`` times, reversing the order each round; returns answers by name.

    Prints the seconds of each round.  A worker whose job takes longer than ``within`` seconds is
    stopped: the lists of its jobs end, and a line says so.  So does one for a job whose process was
    swapped out.
    """
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    for number in range(rounds):
        names = list(jobs) if number % 2 == 0 else list(reversed(jobs))
        took = []
        for name in names:
            worker, do, job = jobs[name]
            if worker.stopped:
                continue
            time.sleep(0.2)  # until the other worker's threads are idle
            try:
                answer = worker.ask(do, within=within, **job)
            except TimeoutExceeded:
                say(f"{worker.name} did not finish {do!r} within {within:.0f} s: stopped")
                continue
            if answer["faults"] > MOST_FAULTS:
                say(f"{worker.name} was short of memory in {do!r}: {answer['faults']} page faults")
            answers[name].append(answer)
            took.append(f"{name} {answer['seconds']:.2f} s")
        say(f"round {number + 1} of {rounds}: {', '.join(took)}")
    return answers


def say(line: str) -> None:
    """Prints a line of progress."""
    print(line, file=sys.stderr, flush=True)


def median_and_spread(values: Sequence[float]) -> str:
    """Formats values as ``median (min - max)``; a dash if there are none."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.4g}"
    return f"{statistics.median(values):.4g} ({min(values):.4g} - {max(values):.4g})"


def ratio_of(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Formats the ratio of the medians, and the smallest and largest ratio of any round."""
    if not ours or not theirs:
        return "-"
    pairs = [a / b for a, b in zip(ours, theirs, strict=False)]
    whole = statistics.median(ours) / statistics.median(theirs)
    return f"{whole:.2f} ({min(pairs):.2f} - {max(pairs):.2f})"


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Formats rows with the same keys as a Markdown table."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row[column] for column in columns) + " |" for row in rows]
    return "\n".join(lines)
