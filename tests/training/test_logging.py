"""What a run writes down survives kills and reads back as it was."""

import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.training import logging
from prompt_tuning_jax.training.logging import RunLog, read_metrics

TOTAL = 60


def measurements(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {
        "losses_E": rng.random(3, dtype=np.float32),
        "accuracies_E": rng.random(3, dtype=np.float32),
        "gradient_norms_E": rng.random(3, dtype=np.float32),
    }


def train(workdir: Path, *, start: int = 0, stop: int = TOTAL) -> None:
    """A loop as the real one: train lines every 10 steps, evaluations every 20."""
    log = RunLog(workdir, total_steps=TOTAL, num_members=3, quiet=True, start_step=start)
    with log:
        for step in range(start + 10, stop + 1, 10):
            log.log_train(step, **measurements(step), learning_rate=0.3, examples_per_second=9.5)
            if step % 20 == 0:
                log.log_eval(step, [{"accuracy": step + i, "f1": 0.5} for i in range(3)])


def lines(workdir: Path) -> bytes:
    return (workdir / "metrics.jsonl").read_bytes()


def test_what_was_logged_reads_back(tmp_path: Path) -> None:
    with RunLog(tmp_path / "new" / "run", total_steps=9, num_members=2, quiet=True) as log:
        log.log_train(
            4,
            np.float32([0.1, 2.5]),
            accuracies_E=[0, 1],
            gradient_norms_E=[0, 1],
            learning_rate=np.float32(0.3),
            examples_per_second=1520.25,
            tokens_per_second=48_648.04,
            flops_per_second=2.5e11,
        )
        log.log_eval(np.int32(4), [{"accuracy": np.float32(0.7)}, {"accuracy": 1}])
    assert read_metrics(tmp_path / "new" / "run" / "metrics.jsonl") == [
        {
            "kind": "train",
            "step": 4,
            "loss": [0.1, 2.5],
            "accuracy": [0.0, 1.0],
            "gradient_norm": [0.0, 1.0],
            "learning_rate": 0.3,
            "examples_per_second": 1520.2,
            "tokens_per_second": 48_648.0,
            "flops_per_second": 2.5e11,
        },
        {"kind": "eval", "step": 4, "metrics": [{"accuracy": 0.7}, {"accuracy": 1.0}]},
    ]


def test_float32_values_lose_nothing(tmp_path: Path) -> None:
    losses_E = np.random.default_rng(0).lognormal(sigma=9, size=500).astype(np.float32)
    with RunLog(tmp_path, total_steps=1, num_members=500, quiet=True) as log:
        log.log_train(
            1,
            losses_E,
            accuracies_E=losses_E,
            gradient_norms_E=losses_E,
            learning_rate=losses_E,
            examples_per_second=1,
        )
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    for key in ("loss", "accuracy", "learning_rate"):
        np.testing.assert_array_equal(np.float32(record[key]), losses_E)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null_in_strict_json(tmp_path: Path, value: float) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    with RunLog(tmp_path, total_steps=1, num_members=1, quiet=True) as log:
        log.log_train(
            1,
            [value],
            accuracies_E=[1],
            gradient_norms_E=[1],
            learning_rate=1,
            examples_per_second=value,
        )
        log.log_eval(1, [{"f1": value}])
    texts = lines(tmp_path).decode().splitlines()
    first, second = (json.loads(text, parse_constant=refuse) for text in texts)
    assert first["loss"] == [None] and first["examples_per_second"] is None
    assert second["metrics"] == [{"f1": None}]
    assert math.isnan(read_metrics(tmp_path / "metrics.jsonl")[0]["loss"][0])


@pytest.mark.parametrize(
    ("killed_at", "resumed_from"),
    [(10, 0), (10, 10), (40, 0), (40, 10), (40, 20), (40, 40), (TOTAL, 20), (TOTAL, TOTAL)],
)
def test_a_resumed_run_leaves_the_file_of_an_uninterrupted_one(
    tmp_path: Path, killed_at: int, resumed_from: int
) -> None:
    train(tmp_path / "whole")
    train(tmp_path / "killed", stop=killed_at)
    train(tmp_path / "killed", start=resumed_from)
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".*"))


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path: Path) -> None:
    train(tmp_path)
    whole = lines(tmp_path)
    first_three = b"".join(whole.splitlines(keepends=True)[:3])  # steps 10, 20, 20
    for cut in range(len(first_three) + 1, len(whole), 29):
        (tmp_path / "metrics.jsonl").write_bytes(whole[:cut])
        assert len(read_metrics(tmp_path / "metrics.jsonl")) >= 3
        train(tmp_path, start=20)
        assert lines(tmp_path) == whole


def test_a_step_is_written_once(tmp_path: Path) -> None:
    train(tmp_path)
    whole = lines(tmp_path)
    with RunLog(tmp_path, total_steps=TOTAL, num_members=3, quiet=True, start_step=TOTAL) as log:
        log.log_eval(TOTAL, [{"accuracy": 0}] * 3)
    assert lines(tmp_path) == whole


def test_a_damaged_file_is_named_and_kept(tmp_path: Path) -> None:
    train(tmp_path)
    damaged = lines(tmp_path).replace(b"{", b"", 1)
    (tmp_path / "metrics.jsonl").write_bytes(damaged)
    with pytest.raises(UserError, match=r"line 1 of .*metrics\.jsonl"):
        train(tmp_path, start=20)
    assert lines(tmp_path) == damaged
    (tmp_path / "metrics.jsonl").unlink()
    train(tmp_path)  # the failure has not kept the folder locked


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*--workdir"):
        RunLog(tmp_path / "file", total_steps=1, num_members=1, quiet=True)
    with pytest.raises(UserError, match="nowhere"):
        read_metrics(tmp_path / "nowhere" / "metrics.jsonl")


def test_only_one_run_at_a_time_writes_to_a_folder(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_steps=1, num_members=1, quiet=True) as log:
        log.log_eval(0, [{"f1": 1}])
        with pytest.raises(UserError, match="another process"):
            RunLog(tmp_path, total_steps=1, num_members=1, quiet=True)
        log.log_eval(1, [{"f1": 2}])
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
    train(tmp_path)


def test_a_kill_frees_the_folder(tmp_path: Path) -> None:
    code = (
        "import os, signal; from prompt_tuning_jax.training.logging import RunLog\n"
        f"log = RunLog({str(tmp_path)!r}, total_steps=1, num_members=1, quiet=True)\n"
        "log.log_eval(1, [{'f1': 1}])\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -9
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
    train(tmp_path)


def test_members_must_agree(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_steps=1, num_members=2, quiet=True) as log:
        with pytest.raises(ValueError, match="2 members"):
            log.log_train(
                1,
                [0.5],
                accuracies_E=[1],
                gradient_norms_E=[1],
                learning_rate=1,
                examples_per_second=1,
            )
        with pytest.raises(ValueError, match="2 members"):
            log.log_eval(1, [{}])
    assert lines(tmp_path) == b""


def read_events(folder: Path) -> list:
    """The events, by the format of a TFRecord file, every checksum compared."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    events = []
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            body = data[12 : 12 + length]
            assert struct.unpack("<I", data[8:12]) == (masked_crc32c(data[:8]),)
            assert struct.unpack("<I", data[12 + length : 16 + length]) == (masked_crc32c(body),)
            events.append(Event.FromString(body))
            data = data[16 + length :]
    return events


def test_tensorboard_gets_every_member(tmp_path: Path) -> None:
    train(tmp_path)
    train(tmp_path, start=40)
    events = read_events(tmp_path / "tensorboard")
    assert events[0].file_version == "brain.Event:2"
    restarts = [event.step for event in events if event.HasField("session_log")]
    assert restarts == [1, 41]  # TensorBoard forgets what it has from that step on
    scalars = [
        (value.tag, event.step, value.simple_value)
        for event in events
        for value in event.summary.value
    ]
    for i in range(3):
        found = [(s, v) for tag, s, v in scalars if tag == f"train/loss/seed_{i}"]
        steps = [10, 20, 30, 40, 50, 60, 50, 60]
        assert found == [(s, measurements(s)["losses_E"][i]) for s in steps]
    assert ("eval/accuracy/seed_2", 20, 22.0) in scalars


def test_samples_are_texts_of_tensorboards_plugin(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_steps=1, num_members=1, quiet=True) as log:
        log.log_samples(3, {"task samples": "    input: é"})
        log.log_samples(4, {})
    (event,) = [e for e in read_events(tmp_path / "tensorboard") if e.summary.value]
    (value,) = event.summary.value
    assert (event.step, value.tag) == (3, "task samples/text_summary")
    assert value.metadata.plugin_data.plugin_name == "text"
    assert value.tensor.string_val == ["    input: é".encode()]
    assert lines(tmp_path) == b""  # of the metrics file


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from prompt_tuning_jax.training.logging import RunLog\n"
        f"with RunLog({str(tmp_path)!r}, total_steps=1, num_members=1) as log:\n"
        "    log.log_train(1, [1], accuracies_E=[1], gradient_norms_E=[1], learning_rate=1,\n"
        "                  examples_per_second=1)\n"
        "assert 'tensorboard' in sys.modules and 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert list((tmp_path / "tensorboard").iterdir())


def test_without_tensorboard_the_rest_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    train(tmp_path)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 9
    assert capsys.readouterr().err.count("no TensorBoard events") == 1


def test_a_pipe_gets_a_line_now_and_then(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    with RunLog(tmp_path, total_steps=3600, num_members=2, clock=lambda: now) as log:
        for step in range(1, 3601):
            now = 100 + step / 10  # ten steps a second
            log.log_train(
                step,
                [1, 2],
                accuracies_E=[0, 1],
                gradient_norms_E=[0, 1],
                learning_rate=1,
                examples_per_second=1520,
            )
            if step == 1800:
                log.log_eval(step, [{"f1": 50, "accuracy": 60}, {"f1": 70, "accuracy": 80}])
    printed = capsys.readouterr().out.splitlines()
    assert (
        len(printed) == 3600 / 10 / logging.PLAIN_SECONDS + 1 + 1
    )  # the first step, the evaluation
    assert (
        printed[1] == "step 101/3600  loss 1.5000  train exact match 50.0 %  1,520 ex/s  5:50 left"
    )
    assert (
        "step 1800: f1 60 [50, 70], accuracy 70 [60, 80]  (mean [lowest, highest] of 2)" in printed
    )
    assert printed[-1].startswith("step 3600/3600") and "  eval f1 60  " in printed[-1]


def test_speed_is_told_in_examples_tokens_and_operations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog(tmp_path, total_steps=1, num_members=1) as log:
        log.log_train(
            1,
            [1],
            accuracies_E=[0],
            gradient_norms_E=[0],
            learning_rate=1,
            examples_per_second=140,
            tokens_per_second=7840,
            flops_per_second=2.034e11,
        )
    assert "140 ex/s 7,840 tok/s 203 GFLOP/s" in capsys.readouterr().out


def test_the_chosen_metric_is_shown_and_quiet_is_quiet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = {"invalid": 0.0, "f1": 81.25}
    with RunLog(tmp_path, total_steps=1, num_members=1, metric="f1") as log:
        log.log_eval(1, [scores])
    assert capsys.readouterr().out == "step 1: f1 81.25, invalid 0\n"
    train(tmp_path)
    assert capsys.readouterr() == ("", "")
