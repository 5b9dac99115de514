"""``scripts/check_gpu``: a rehearsal on the CPU, and what becomes of parts that fail or hang."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from prompt_tuning_jax.config.experiment import Experiment, Training
from prompt_tuning_jax.inference.ensemble import DecodeConfig, label_scores, write
from prompt_tuning_jax.inference.setup import attach_members, partitioner_of
from prompt_tuning_jax.methods import PromptTuning
from prompt_tuning_jax.models.ops import cpu, matmul
from prompt_tuning_jax.training import build
from tests.micro import make_t5
from tests.script import SCRIPTS, load_script
from tests.tiny_lm import make_lm

_WORKER = """
import json, sys, time
job = json.loads(sys.argv[1])
def row(kind, **fields):
    print(json.dumps({"row": kind, "section": section, **fields}), flush=True)
for section in job["sections"]:
    if section == "card":
        row("machine", device="NVIDIA H200", memory_gb=140.0, matmul={"bfloat16": 8e14},
            jax="1", jaxlib="1")
    elif section == "operations":
        row("check", name="dot", status="pass", result="a | b")
    elif section == "small":
        row("speed", model="small", program="train", length=128, rows=16, seconds=[2.0, 1.0, 3.0],
            flops=4e14, trace_seconds=1.0, compile_seconds=2.0, program_gb=1.0, peak_gb=2.0)
    elif section == "serve":
        row("begin", name="scores")
        row("check", name="scores", status="pass", result="")
        row("begin", name="texts")
        time.sleep(60)
    elif section == "peft":
        row("begin", name="base")
        time.sleep(60)
    elif section == "resume":
        row("begin", name="resume")
        sys.exit(3)
    elif section == "models":
        row("check", name="T5", status="FAIL", result="error 1")
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return load_script("check_gpu")


def ran(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> tuple[int, dict[str, Any]]:
    """The exit status and the written numbers, with a worker that only says what it is told."""
    (tmp_path / "_check_gpu_worker.py").write_text(_WORKER)
    monkeypatch.setattr(script, "WORKERS", tmp_path)
    monkeypatch.setattr(script.signal, "signal", lambda *_: None)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(sys, "argv", ["check_gpu", *arguments])
    status = script.main()
    return status, json.loads((tmp_path / "out" / "check_gpu.json").read_text())


def test_parts_that_pass(
    script: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, numbers = ran(script, tmp_path, monkeypatch, "--sections", "operations")
    assert status == 0
    assert [row["row"] for row in numbers["rows"]] == ["machine", "check"]
    captured = capsys.readouterr()
    assert "| operations | dot | pass | a / b |" in captured.out
    assert (tmp_path / "out" / "check_gpu.md").read_text() in captured.out + "\n"
    assert "NVIDIA H200, 140 GB" in captured.out and "datasheet 989.4 in bfloat16" in captured.out
    assert "dot: pass" in captured.err


def test_parts_that_fail_hang_or_die_do_not_end_the_others(
    script: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Those that hang have small shares of the time.
    shares = dict.fromkeys(("card", "operations", "models", "resume", "small"), 20)
    monkeypatch.setattr(script, "_WEIGHTS", {**shares, "serve": 2, "peft": 2})
    status, numbers = ran(script, tmp_path, monkeypatch, "--models", "small", "--minutes", "0.5")
    assert status == 1
    checks = {
        (row["section"], row["name"]): (row["status"], row["result"])
        for row in numbers["rows"]
        if row["row"] == "check"
    }
    assert checks["operations", "dot"][0] == checks["serve", "scores"][0] == "pass"
    assert checks["models", "T5"][0] == "FAIL"
    found, why = checks["serve", "texts"]  # after another check of its section
    assert found == "skipped" and why.startswith("ended after its ")
    assert checks["resume", "resume"] == ("FAIL", "the process ended with status 3")
    assert checks["peft", "base"][0] == "FAIL"  # nothing was checked
    out = capsys.readouterr().out
    assert "| small | train | 128 | 16 | 2000 (1000 - 3000) | 8 rows | 200 | 20.2 | 25.0 |" in out
    assert "2 checks passed, 3 failed, 1 skipped" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--minutes", "0"), "must be more than 0"),
        (("--batch_size", "0"), "must be at least 1"),
        (("--sections", "serving"), "invalid choice: 'serving'"),
        (("--json", "/no/such/folder/x.json"), "there is no folder /no/such/folder"),
    ],
)
def test_wrong_options(
    arguments: tuple[str, ...],
    message: str,
    script: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["check_gpu", *arguments])
    with pytest.raises(SystemExit) as ended:
        script.parse()
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_peaks_of_cards(script: Any) -> None:
    from _check_gpu_tables import peak_of  # type: ignore[import-not-found]

    assert peak_of("NVIDIA H100 80GB HBM3") == 989.4e12 != peak_of("NVIDIA H100 PCIe")
    assert peak_of("NVIDIA L40S") != peak_of("NVIDIA L4") == 121e12
    assert peak_of("NVIDIA A10G") != peak_of("NVIDIA A100-SXM4-80GB") == 311.9e12
    assert peak_of("Tesla T4") == pytest.approx(65.1e12) and peak_of("cpu") is None


def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    done = rehearse(tmp_path, "--sections", "speed", small=False)
    assert done.returncode == 1
    assert "JAX sees no GPU, only cpu" in done.stdout and "0 checks passed" in done.stdout


@pytest.mark.slow
def test_a_rehearsal(tmp_path: Path) -> None:
    sections = ("operations", "models", "speed", "serve", "resume")
    done = rehearse(tmp_path, "--minutes", "30", "--sections", *sections)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failed, 0 skipped" in done.stdout
    rows = json.loads((tmp_path / "check_gpu.json").read_text())["rows"]
    found = {row["section"] for row in rows if row["row"] == "check"}
    assert found == {"card", "operations", "models", "check_gpu_lm", "serve", "resume"}
    speeds = {row["program"]: row for row in rows if row["row"] == "speed"}
    assert speeds.keys() == {"train, loop on", "train, loop off", "rank", "generate 4"}
    assert all(min(row["seconds"]) > 0 for row in speeds.values())
    assert all(speeds[name]["flops"] > 1e6 for name in ("train, loop on", "rank"))


def rehearse(
    tmp_path: Path, *arguments: str, small: bool = True
) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(SCRIPTS / "check_gpu"), *arguments, *["--small"] * small]
    environment = {**os.environ, "OUT": str(tmp_path)}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=1800, env=environment, check=False
    )


@pytest.mark.parametrize(("family", "scan"), [("t5", "on"), ("causal", "off")])
def test_programs_lower_for_cuda(family: str, scan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (matmul, cpu):
        monkeypatch.setattr(module, "for_cpu", lambda: False)
    monkeypatch.setattr(build, "_on_cpu", lambda partitioner: False)
    made: Any = make_t5 if family == "t5" else make_lm
    model = made(dtype=jax.numpy.bfloat16, param_dtype=jax.numpy.bfloat16)
    experiment = Experiment(
        method=PromptTuning(length=3, init="uniform"), training=Training(scan_layers=scan)
    )
    members = attach_members(experiment, model, labels=())
    tokens_BT, labels_CS = np.full((2, 6), 5, np.int32), np.full((2, 2), 5, np.int32)
    arguments = (members.trainable, members.frozen, tokens_BT)
    decode = DecodeConfig(max_length=3)
    programs = {
        "rank": label_scores.trace(members.graphdef, *arguments, labels_CS, 1),
        "write": write.trace(members.graphdef, decode, *arguments, jax.random.key(0)),
    }
    members = build.with_stacked_layers(experiment, members, partitioner_of(experiment))
    state, step, _ = build.build_step(experiment, members)
    batch = {"inputs": tokens_BT[None], "targets": labels_CS[None]}
    programs["step"] = step.trace(state, members.frozen, batch)  # type: ignore[attr-defined]
    for name, traced in programs.items():
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert "bf16" in text, name
        # Barriers around products are for the CPU, which also transposes operands.
        assert "stablehlo.optimization_barrier" not in text, name
