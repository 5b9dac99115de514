"""Several processes: who is meant, what they tell each other, and runs of two."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from prompt_tuning_jax.checkpoints import train_state
from prompt_tuning_jax.distributed import processes
from prompt_tuning_jax.distributed.heartbeat import Heartbeat
from prompt_tuning_jax.distributed.processes import Processes, several_are_meant
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.studies.runs import SCORES, suite
from prompt_tuning_jax.training.run import train
from tests import tiny_run
from tests.devices import with_devices
from tests.test_suite import CB, base, write_cb
from tests.watched_runs import watched_runs

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("SLURM_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_COMPLETION")):
            monkeypatch.delenv(name)


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("environment", "meant"),
    [
        ({}, False),
        (SLURM, True),
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        # A shell within an allocation of many tasks.
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({name: SLURM[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS")}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
    ],
)
def test_surroundings_say_whether_several_processes_are_meant(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], meant: bool
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert several_are_meant(Processes()) is meant
    assert several_are_meant(Processes(count=1)) is False
    by_flags = Processes(coordinator_address="host:1234", count=2, index=1)
    assert several_are_meant(by_flags) is True


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"count": 2}, "go together"),
        ({"coordinator_address": "h:1", "index": 0}, "go together"),
        (
            {"coordinator_address": "h:1", "count": 2, "index": 2},
            "--process_index 2: must be from 0 to 1",
        ),
        ({"coordinator_address": "host", "count": 2, "index": 1}, "HOST:PORT"),
    ],
)
def test_flags_that_do_not_go_together(flags: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        several_are_meant(Processes(**flags))  # type: ignore[arg-type]


def test_a_pod_of_an_indexed_job_wants_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(UserError, match="pip install kubernetes"):
        several_are_meant(Processes())


class Store:
    """The coordination service's key-value store, as far as it is used."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.changed = threading.Condition()

    def key_value_set(self, key: str, value: str, *, allow_overwrite: bool) -> None:
        with self.changed:
            self.values[key] = value
            self.changed.notify_all()

    def key_value_dir_get(self, folder: str) -> list[tuple[str, str]]:
        with self.changed:
            return [(key, v) for key, v in self.values.items() if key.startswith(folder)]

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        with self.changed:
            assert self.changed.wait_for(lambda: key in self.values, milliseconds / 1000)
            return self.values[key]


def heartbeats(
    count: int, *, silence_seconds: float = 5.0
) -> tuple[list[Heartbeat], list[list[int]]]:
    store = Store()
    left: list[list[int]] = [[] for _ in range(count)]
    found = []
    for index in range(count):
        beat = Heartbeat(
            client=store,
            index=index,
            count=count,
            silence_seconds=silence_seconds,
            interval=0.01,
            leave=left[index].append,
        )
        found.append(beat)
    return found, left


def until(condition: object, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:  # type: ignore[operator]
        time.sleep(0.01)
    assert condition()  # type: ignore[operator]


def test_an_error_is_reported_without_a_coordinator(capsys: pytest.CaptureFixture[str]) -> None:
    (beat,), (left,) = heartbeats(1)
    beat.start()

    def gone(*_: object) -> None:
        raise RuntimeError("UNAVAILABLE")

    for name in ("key_value_set", "key_value_dir_get", "blocking_key_value_get"):
        setattr(beat.client, name, gone)
    beat.fail(UserError("the real error"))
    assert left == [2] and "process 0: the real error" in capsys.readouterr().err


def test_a_signal_to_one_stops_all_after_the_same_step() -> None:
    found, left = heartbeats(3)
    received: list[list[int]] = [[], [], []]
    reached = [w.agree_on(r, 0) for w, r in zip(found, received, strict=True)]
    for beat in found:
        beat.start()
    stops: list[tuple[int, int]] = [(0, 0)] * 3

    def loop(index: int) -> None:
        for step in range(1, 2000):
            time.sleep(0.001 * (index + 1))  # they drift apart, as loops that dispatch ahead do
            if number := reached[index](step):
                stops[index] = (step, number)
                return

    threads = [threading.Thread(target=loop, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    received[1].append(signal.SIGTERM)
    for thread in threads:
        thread.join()
    for beat in found:
        beat.finish()
    assert len(set(stops)) == 1 and stops[0][1] == signal.SIGTERM and 0 < stops[0][0] < 2000
    assert left == [[], [], []]


def test_a_failure_of_one_ends_all(capsys: pytest.CaptureFixture[str]) -> None:
    found, left = heartbeats(2)
    for beat in found:
        beat.start()
    found[1].fail(UserError("no such file x.jsonl"))
    assert left[1] == [2]
    until(lambda: left[0])
    assert set(left[0]) == {1}
    found[0].finish()
    said = capsys.readouterr().err
    assert "error: process 1: no such file x.jsonl\n" in said
    assert "process 0 stops because process 1 has stopped: no such file" in said


def test_a_process_that_falls_silent_ends_all(capsys: pytest.CaptureFixture[str]) -> None:
    found, left = heartbeats(2, silence_seconds=0.2)
    found[0].start()
    until(lambda: left[0])
    found[0].finish()
    assert "process 1 has not responded for 0.2 s" in capsys.readouterr().err


def test_a_process_that_is_through_is_not_missed() -> None:
    found, left = heartbeats(2, silence_seconds=0.2)
    for beat in found:
        beat.start()
    found[1].finish()
    time.sleep(0.5)
    found[0].finish()
    assert left == [[], []]


def test_one_process_needs_none_of_it() -> None:
    done: list[str] = []
    with processes.started(Processes(count=1)):
        processes.primary_first(lambda: done.append("claimed"), "claim")
        processes.require_same("the data", "x")
        received: list[int] = []
        reached = processes.stop_agreement(received, start=0)
        assert reached(1) == 0
        received.append(signal.SIGTERM)
        assert reached(2) == signal.SIGTERM
    assert done == ["claimed"] and processes.is_primary()


SAME = {
    # Without what makes sums of different order drift apart: see test_meshes.py.
    "model.dropout_rate": 0.0,
    "training.steps": 20,
    "training.batch_size": 8,
    "training.eval_every": 10,
    "training.save_every": 5,
    "data.buckets": "none",
    "optimizer.name": "sgd",
    "optimizer.learning_rate": 0.1,
}


def start(
    config: Path,
    *options: str,
    devices: int = 1,
    cwds: Sequence[Path] = (),
    command: Sequence[str] = ("train",),
) -> list[subprocess.Popen[str]]:
    """``prompt-tuning train`` in two processes; what they say is in ``config``.INDEX."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = with_devices(devices, PYTHONPATH=str(tiny_run.ROOT))
    started = []
    for index in range(2):
        said = config.with_suffix(f".{index}").open("w")
        line = [sys.executable, "-m", "prompt_tuning_jax", *command, str(config), *options]
        line += ["--coordinator_address", f"127.0.0.1:{port}", "--process_count", "2"]
        line += ["--process_index", str(index)]
        started.append(
            subprocess.Popen(
                line,
                stdout=said,
                stderr=said,
                text=True,
                env=environment,
                cwd=cwds[index] if cwds else None,
            )
        )
    return started


def finish(processes: list[subprocess.Popen[str]], config: Path, seconds: float = 180) -> list[int]:
    try:
        return [process.wait(seconds) for process in processes]
    except subprocess.TimeoutExpired:
        said = [config.with_suffix(f".{i}").read_text()[-3000:] for i in range(len(processes))]
        raise AssertionError("they hang:\n" + "\n---\n".join(said)) from None
    finally:
        for process in processes:
            process.kill()


def of(tmp_path: Path, name: str, **changes: object) -> tuple[Path, Path]:
    workdir = tmp_path / name
    experiment = tiny_run.experiment(workdir, SAME | changes)
    return tiny_run.write_config(tmp_path / f"{name}.py", experiment), workdir


def require_equal(workdir: Path, reference: Path) -> None:
    mine, theirs = tiny_run.measurements(workdir), tiny_run.measurements(reference)
    assert [m["step"] for m in mine] == [m["step"] for m in theirs]
    for one, other in zip(mine, theirs, strict=True):
        if one["kind"] == "train":
            np.testing.assert_allclose(one["loss"], other["loss"], atol=1e-5)
        else:
            assert one == other
    for kind in ("last", "best"):
        saved = [train_state.read_latest(w / "checkpoints" / kind) for w in (workdir, reference)]
        assert saved[0] is not None and saved[1] is not None and saved[0][0] == saved[1][0]
        for name, array in saved[0][1].items():
            np.testing.assert_allclose(array, saved[1][1][name], atol=1e-5, err_msg=name)
    assert {f.name for f in (workdir / "prompts").iterdir()} == {
        f.name for f in (reference / "prompts").iterdir()
    }
    assert (workdir / "results.json").is_file() and (workdir / "curves.png").is_file()


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process with one device: this one."""
    workdir = tmp_path_factory.mktemp("single")
    assert train(tiny_run.experiment(workdir, SAME), quiet=True).finished
    return workdir


def said_by(config: Path, index: int) -> str:
    return config.with_suffix(f".{index}").read_text()


@pytest.mark.slow
def test_several_processes_train_as_one_does(tmp_path: Path, single: Path) -> None:
    """Stopped by a signal, and resumed on a mesh of more devices."""
    config, workdir = of(tmp_path, "several")
    processes = start(config)
    until((workdir / "metrics.jsonl").is_file, 120)
    time.sleep(0.3)
    processes[1].send_signal(signal.SIGTERM)  # while the step is compiled
    assert finish(processes, config) == [128 + signal.SIGTERM] * 2, said_by(config, 0)
    last = train_state.read_latest(workdir / "checkpoints" / "last")
    assert last is not None and 0 < last[0] < 20
    assert f"stopped and saved at step {last[0]}" in said_by(config, 0)
    processes = start(config, "--mesh", "data=1,dcn_data=2,fsdp=2,model=2", devices=4)
    assert finish(processes, config) == [0, 0], said_by(config, 0)
    require_equal(workdir, single)
    assert "parameters train" in said_by(config, 0) and "train" not in said_by(config, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "victim", "message"),
    [
        (signal.SIGKILL, 1, "another process ended in the middle of a step"),
        (signal.SIGKILL, 0, "UNAVAILABLE"),  # JAX's own words: its coordinator has gone
        (signal.SIGSTOP, 1, "process 1 has not responded for 4 s"),
    ],
)
def test_a_process_that_dies_ends_the_others(
    tmp_path: Path, number: int, victim: int, message: str
) -> None:
    config, workdir = of(tmp_path, "killed", **{"training.steps": 10**6})
    processes = start(config, "--process_timeout", "4")
    until(lambda: (workdir / "checkpoints" / "last").is_dir(), 120)
    processes[victim].send_signal(number)
    try:
        assert processes[1 - victim].wait(40) not in (0, None)
        assert message in said_by(config, 1 - victim)
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
def test_an_error_of_one_process_alone_ends_the_others(tmp_path: Path) -> None:
    config, workdir = of(tmp_path, "one_errs", **{"data.train": "train.jsonl"})
    folders = [tmp_path / "there", tmp_path / "not_there"]
    tiny_run.write_rows(folders[0] / "train.jsonl", tiny_run.rows(48, seed=1))
    folders[1].mkdir()
    processes = start(config, cwds=folders)
    assert finish(processes, config, 60) == [1, 2], said_by(config, 0)
    assert "error: process 1: " in said_by(config, 1) and "train.jsonl" in said_by(config, 1)
    assert "process 0 stops because process 1 has stopped: " in said_by(config, 0)
    assert not (workdir / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_suite_of_two_processes_is_scored_as_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the first process writes and prints; a single process resumes in the folder."""
    data_dir = write_cb(tmp_path / "data")
    changes = {"model.dropout_rate": 0.0, "data.buckets": "none", "training.batch_size": 4}
    of = base(tmp_path / "w", data_dir, changes)
    config = tiny_run.write_config(tmp_path / "c.py", of)
    command = ("suite", "super_glue", "--tasks", "cb", "--seeds", "0,1", "--config")
    assert finish(start(config, command=command), config) == [0, 0], said_by(config, 0)
    assert "| cb " in said_by(config, 0) and "cb" not in said_by(config, 1)
    written = json.loads((tmp_path / "w/taskless_super_glue.json").read_text())
    assert len(written["tasks"]["cb"]["per_prompt"]) == 2
    scores = tmp_path / "w" / CB / SCORES
    kept = json.loads(scores.read_text())
    scores.write_text(json.dumps({**kept, "scores": {}}))
    counted = watched_runs(monkeypatch, lambda name, of: name)
    assert suite(of, "super_glue", tasks=["cb"], quiet=True).scores == written
    assert counted == ["train", "evaluate"]  # train returns at once, because the run is finished
