"""Ctrl-C at any moment of a command: status 130, no traceback, nothing swallowed."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prompt_tuning_jax.cli import main
from prompt_tuning_jax.cli.interruption import Interruption, interruptible
from prompt_tuning_jax.cli.train import Train

ROOT = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def within() -> Iterator[Interruption]:
    with interruptible(sys._getframe()) as interruption:
        yield interruption


@pytest.fixture(autouse=True)
def handler_stays() -> Iterator[None]:
    # Whoever runs the tests in the background ignores it, and so would what they start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def caught() -> None:
    with contextlib.suppress(KeyboardInterrupt):
        press()


def in_a_weak_reference() -> None:
    class Thing:
        pass

    thing = Thing()
    reference = weakref.ref(thing, lambda _: press())
    del thing
    assert reference() is None


def in_a_destructor() -> None:
    class Thing:
        def __del__(self) -> None:
            press()

    Thing()


@pytest.mark.parametrize("swallowed", [caught, in_a_weak_reference, in_a_destructor])
def test_what_is_swallowed_comes_again(
    swallowed: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), within():
        swallowed()
        while time.monotonic() - began < 5:
            time.sleep(0.01)
    assert time.monotonic() - began < 2
    assert "Traceback" not in capsys.readouterr().err


def test_what_cleans_up_is_not_interrupted_again() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), within():
        try:
            press()
        finally:
            for _ in range(20):
                time.sleep(0.01)
            done.append("cleaned up")
    assert done


def test_an_import_is_finished_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "takes_long.py").write_text(
        "import signal, time\nsignal.raise_signal(signal.SIGINT)\ntime.sleep(0.2)\nwhole = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    with pytest.raises(KeyboardInterrupt), within():
        import takes_long  # type: ignore[import-not-found]

        found.append(takes_long)
        time.sleep(1)
    assert found and found[0].whole


def test_pressed_twice_interrupts_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), within():
        try:
            press()
        finally:
            press()
            time.sleep(5)


def test_an_error_that_an_interruption_became_is_one_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: Train) -> None:
        try:
            press()
        except KeyboardInterrupt:
            raise ImportError("cannot import name 'datetime'") from None

    monkeypatch.setattr(Train, "run", run)
    assert main.main(["train"]) == 130
    assert capsys.readouterr().err == ""


def test_other_threads_and_background_jobs_keep_their_handlers() -> None:
    def run() -> None:
        with within():
            found.append(signal.getsignal(signal.SIGINT))

    found: list[object] = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts `command &`
    try:
        run()
    finally:
        signal.signal(signal.SIGINT, before)
    assert found == [signal.default_int_handler, signal.SIG_IGN]


# The config imports flax, like a user's config that registers tasks or methods.
CONFIG = """\
import flax
from prompt_tuning_jax.config.experiment import Experiment, Training


def get_config() -> Experiment:
    return Experiment(training=Training(steps=1))
"""


# Modules in the order of their imports; -X importtime prints a line after each of them.
@pytest.mark.parametrize("when", ["argparse", "numpy", "jax._src.lib", "flax"])
def test_a_process_that_is_interrupted_while_it_starts(tmp_path: Path, when: str) -> None:
    config, cwd = tmp_path / "config.py", tmp_path / "cwd"
    config.write_text(CONFIG)
    cwd.mkdir()
    command = [sys.executable, "-X", "importtime", "-m", "prompt_tuning_jax", "train"]
    command += ["--model", "tiny", str(config), "--workdir", "w"]
    child = subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stderr is not None
    for line in child.stderr:
        if line.rpartition("|")[2].strip() == when:
            break
    child.send_signal(signal.SIGINT)
    said = [line for line in child.stderr if not line.startswith("import time:")]
    assert child.wait(60) == 130
    assert said == []
    assert [*cwd.iterdir()] == []
