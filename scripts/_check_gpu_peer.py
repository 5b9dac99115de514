"""Measurements of ``check_gpu``: training steps beside Hugging Face PEFT on torch, on one card."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from _check_gpu_report import Report
from _check_gpu_speed import sizes_of
from _rivals import Worker, median_and_spread, ratio_of, save_batches, start_of_both, take_turns

_LOSS_DIFFERENCE = 3e-2  # of the first losses, in bfloat16
_STEPS, _ROUNDS = 10, 3
_ASK = (
    "import json, torch, transformers, peft; "
    "print(json.dumps([torch.__version__, transformers.__version__, peft.__version__, "
    "torch.cuda.is_available()]))"
)


def run(report: Report) -> None:
    """Trains with both sides, from the same weights and prompt on the same batches, in turns."""
    small, python = report.options.small, report.options.peer_python
    with report.guarded("PEFT"):
        device = "cpu" if jax.default_backend() == "cpu" else "cuda"
        versions = _versions(python)
        if versions is None:
            report.skip("PEFT", f"{python} cannot import torch, transformers and peft")
            return
        if device == "cuda" and not versions[3]:
            report.skip("PEFT", f"torch {versions[0]} of {python} has no CUDA")
            return
        named = f"torch {versions[0]}, transformers {versions[1]}, PEFT {versions[2]}"
        with tempfile.TemporaryDirectory(prefix="check_gpu_") as scratch:
            workers: list[Worker] = []
            try:
                _compare(report, workers, Path(scratch), named, device, 1 if small else _ROUNDS)
            finally:
                for worker in workers:
                    worker.process.kill()
                    worker.process.wait()


def _versions(python: str) -> list[Any] | None:
    """Returns the peer's versions and whether it sees a GPU; None if it cannot be imported."""
    try:
        done = subprocess.run([python, "-c", _ASK], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return None
    versions: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return versions


def _compare(
    report: Report, workers: list[Worker], scratch: Path, named: str, device: str, rounds: int
) -> None:
    sizes, name = sizes_of(report), report.options.peer_model
    threads = os.cpu_count() or 1
    folder, prompt = start_of_both(name, scratch, prompt_length=sizes.prompt)
    ours = Worker("this package", "_worker_ours.py", python=sys.executable, threads=threads)
    workers.append(ours)
    peer = Worker("PEFT", "_worker_peft.py", python=report.options.peer_python, threads=threads)
    workers.append(peer)
    common = {"model": str(folder), "dtype": "bfloat16", "prompt": str(prompt)}
    ours.ask("load", **common, batch_size=sizes.batch)
    peer.ask("load", **common, device=device)
    steps = 2 if report.options.small else _STEPS
    for length in sizes.lengths:
        with report.guarded(f"PEFT: {name}, {length}"):
            rng = np.random.default_rng(0)
            shapes = (sizes.batch, length), (sizes.batch, sizes.targets)
            batches = [tuple(rng.integers(3, 6000, one) for one in shapes) for _ in range(steps)]
            file = str(save_batches(scratch / f"{length}.npz", batches))
            jobs = {
                "ours": (ours, "train", {"batches": file}),
                "peer": (peer, "train", {"batches": file}),
            }
            first = take_turns(jobs, rounds=1)  # compiles, and gives the first losses
            answers = take_turns(jobs, rounds=rounds)
            rates = {
                side: [steps * sizes.batch / answer["seconds"] for answer in answers[side]]
                for side in answers
            }
            memory = {
                side: worker.ask("memory")["device_peak_mb"] / 1e3
                for side, worker in (("ours", ours), ("peer", peer))
            }
            losses = (first["ours"][0]["losses"][0][0], first["peer"][0]["losses"][0])
            report.row("peer", model=name, length=length, rates=rates, memory_gb=memory)
            same = abs(losses[0] / losses[1] - 1) <= _LOSS_DIFFERENCE
            report.check(
                f"PEFT: {name}, {length}",
                same,
                f"{median_and_spread(rates['ours'])} examples/s, PEFT "
                f"{median_and_spread(rates['peer'])}, ratio "
                f"{ratio_of(rates['ours'], rates['peer'])}; first loss {losses[0]:.4f} and "
                f"{losses[1]:.4f}; peak {memory['ours']:.2f} and {memory['peer']:.2f} GB; {named}",
            )
