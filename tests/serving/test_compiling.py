"""Programs in the order in which they are needed, and requests while most are not there yet."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import jax
import numpy as np
import pytest
from jax._src.compilation_cache import decompress_executable

from prompt_tuning_jax.serving.compiling import CompilationStoppedError, Compiler, Step
from prompt_tuning_jax.serving.engine import Engine
from prompt_tuning_jax.serving.service import Service
from prompt_tuning_jax.serving.shapes import Row
from tests.serving.serving_app import ask, make_service, running, task_folder
from tests.serving.serving_micro import SHAPES, micro_engine, micro_model, write_prompt
from tests.serving.test_engine import drawn_rows
from tests.tiny_run import ROOT, model_folder


def steps(names: str, *, first: str, make: Callable[[str], Any] = str.upper) -> list[Step]:
    return [
        Step(
            key=name, name=f"program {name}", make=lambda name=name: make(name), first=name in first
        )
        for name in names
    ]


def test_what_comes_first_then_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    order: list[str] = []
    gate, begun = threading.Event(), threading.Event()

    def make(name: str) -> str:
        order.append(name)
        begun.set()
        assert gate.wait(10)
        return name.upper()

    compiler = Compiler(steps("abcdefg", first="ce", make=make))
    compiler.start()
    assert begun.wait(10)
    progress = compiler.progress
    assert (progress.first_made, progress.first, progress.made, progress.all) == (0, 2, 0, 7)
    for name in "gfgdq":  # one that there is none of does no harm
        compiler.want(name)
    gate.set()
    said: list[str] = []
    compiler.wait_for_first(said.append)
    assert said == ["program c", "program e"]
    compiler.wait_for_all(said.append)
    assert "".join(order) == "cegfdab"
    assert compiler.made == {name: name.upper() for name in "abcdefg"}
    assert compiler.progress.made == 7


def test_first_ones_are_made_at_once_and_others_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    lock, at_once, most = threading.Lock(), 0, {"abc": 0, "defghi": 0}

    def make(name: str) -> None:
        nonlocal at_once
        group = "abc" if name in "abc" else "defghi"
        with lock:
            at_once += 1
            most[group] = max(most[group], at_once)
        time.sleep(0.05)
        with lock:
            at_once -= 1

    compiler = Compiler(steps("abcdefghi", first="abc", make=make))
    compiler.start()
    compiler.wait_for_first(lambda name: None)
    time.sleep(0.01)
    most["defghi"] = 0
    compiler.wait_for_all(lambda name: None)
    assert most == {"abc": 3, "defghi": 1}


def test_one_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    """A first one fails the start; without another the server goes on."""

    def make(name: str) -> str:
        if name in "bd":
            raise MemoryError(f"no room for {name}")
        return name

    compiler = Compiler(steps("abcd", first="ab", make=make))
    compiler.start()
    with pytest.raises(MemoryError, match="for b"):
        compiler.wait_for_first(lambda name: None)
    compiler.wait_for(["c"])
    with pytest.raises(MemoryError, match="for d"):
        compiler.wait_for(["d"])
    assert compiler.progress.made == 4
    assert [*compiler.made] == ["a", "c"] or {*compiler.made} == {"a", "c"}
    assert "program d could not be compiled" in caplog.text


def test_no_write_to_the_cache_begins_after_the_end_and_those_before_it_are_waited_for() -> None:
    """Of two programs that are compiled at once, one is being written, the other not yet."""
    gates = {name: threading.Event() for name in "ab"}
    written: list[str] = []

    def make(name: str) -> str:
        assert name == "a" or gates["b"].wait(10)
        jax.monitoring.record_event("/jax/compilation_cache/cache_misses")
        written.append(name)
        assert name == "b" or gates["a"].wait(10)
        return name

    compiler = Compiler(steps("ab", first="ab", make=make))
    compiler.start(later=2)
    while written != ["a"]:
        time.sleep(0.01)
    compiler.stop()
    gates["b"].set()
    waiting = threading.Thread(target=compiler.wait_for_writes)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    gates["a"].set()
    waiting.join(10)
    assert not waiting.is_alive()
    for thread in compiler._threads:
        thread.join(10)
    assert written == ["a"]


def test_who_waits_hears_of_the_end() -> None:
    gate = threading.Event()
    compiler = Compiler(steps("ab", first="ab", make=lambda name: gate.wait(10)))
    compiler.start()
    threading.Timer(0.05, compiler.stop).start()
    began = time.monotonic()
    with pytest.raises(CompilationStoppedError):
        compiler.wait_for_first(lambda name: None)
    assert time.monotonic() - began < 5
    gate.set()


class ByAndBy(Compiler):
    """Has the first programs, and others when a test says so."""

    @property
    def is_running(self) -> bool:
        return len(self.made) < len(self._steps)

    def start(self, *, later: int = 1) -> None:
        self.made.update({key: micro_engine()._made[key] for key in self._first})


class Bare(Engine):
    """Has the shared engine's programs by and by."""

    def __init__(self) -> None:
        super().__init__(micro_model(), shapes=SHAPES, cache_rows=6)
        self.all = micro_engine()._made
        self.compiler = ByAndBy(list(self._steps()))
        self._made = self.compiler.made


def test_few_programs_answer_everything_as_all_do() -> None:
    """In any mode, of any length: with the first programs, and with any others beside them."""
    engine, whole = Bare(), micro_engine()
    engine.compile_first()
    assert len(engine.compiler.made) == 5 < len(engine.all)
    rows = drawn_rows(8, seed=1)
    for key in [None, *engine.all]:
        if key is not None and key in engine.compiler.made:
            continue
        if key is not None:
            engine.compiler.made[key] = engine.all[key]
            while engine.measure():
                pass
        for row in rows[:4]:
            number = engine.rows_at_once(engine.program_for("score", [row], 4), 1)
            assert number >= 1
            program = engine.usable("score", [row])
            (found,) = engine.score([row], program)
            (expected,) = whole.score([row], whole.program_for("score", [row], 1))
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_text_is_the_same_with_few_programs_and_with_all() -> None:
    engine, whole = Bare(), micro_engine()
    engine.compile_first()
    whole.reset()
    rows = drawn_rows(3, seed=5, limit=6)
    texts = []
    for one in (engine, whole):
        slots = list[int]()
        for row in rows:
            program = one.usable("generate", [row])
            assert one is whole or (program.length, program.prompt_length) == (16, 7)
            slots.append(next(slot for slot in one.slots_for(program) if slot not in slots))
            one.prefill([row], slots[-1:], program)
        for _ in range(3):
            seen = one.decode(dict(zip(slots, rows, strict=True)))
        assert all(seen.done_M[slot] for slot in slots)
        texts.append([seen.ids_MS[slot].tolist() for slot in slots])
    assert texts[0] == texts[1]
    whole.reset()


def test_measuring_touches_nothing_that_is_being_written() -> None:
    engine, whole = Bare(), micro_engine()
    engine.compile_first()
    (row,) = drawn_rows(1, seed=6, limit=6)
    program = engine.usable("generate", [row])
    slot = engine.slots_for(program)[0]
    engine.prefill([row], [slot], program)
    engine.compiler.made.update(engine.all)
    while engine.measure():
        pass
    assert {*engine.seconds} == {*engine.programs()}
    for _ in range(3):
        seen = engine.decode({slot: row})
    whole.reset()
    program = whole.program_for("generate", [row], 1)
    own = whole.slots_for(program)[0]
    whole.prefill([row], [own], program)
    for _ in range(3):
        expected = whole.decode({own: row})
    np.testing.assert_array_equal(seen.ids_MS[slot], expected.ids_MS[own])
    assert seen.score_M[slot] == pytest.approx(float(expected.score_M[own]), abs=1e-5)
    whole.reset()


def test_what_is_asked_for_is_compiled_sooner() -> None:
    engine = Bare()
    engine.compile_first()
    (row,) = drawn_rows(1, seed=7)
    ideal = engine.program_for("score", [row], 1)
    for _ in range(3):
        engine.usable("score", [row])
    assert engine.compiler._requests.most_common(1)[0][0] == ideal
    engine.compiler._todo.pop(ideal)
    engine.compiler.made[ideal] = engine.all[ideal]
    assert engine.usable("score", [row]) != ideal  # not before its time is known
    while engine.measure():
        pass
    assert engine.usable("score", [row]) == ideal


def test_short_rows_use_long_slots_until_theirs_can_be_decoded() -> None:
    engine = Bare()
    engine.compile_first()
    row = Row(ids=(5, 1), limit=2)
    short, long = SHAPES.pools
    program = engine.program_for("generate", [row], 1)
    reads, decodes = engine._largest(short, None)
    for key in (program, reads, decodes):
        assert engine.slots_for(program) == long.slots
        assert engine.usable("generate", [row]).length == 16
        engine.compiler.made[key] = engine.all[key]
        while engine.measure():
            pass
    assert engine.slots_for(program) == short.slots
    assert engine.usable("generate", [row]) == program
    assert {*engine.compiler._requests} >= {reads, decodes}


def test_the_server_is_ready_with_the_first_and_takes_up_the_others(tmp_path: Path) -> None:
    service: Service = make_service(task_folder(tmp_path))
    engine = Bare()
    service.engine = engine
    service._parser._engine = engine

    async def test(client: httpx.AsyncClient) -> None:
        status = (await client.get("/readyz")).json()
        assert status["status"] == "ready"
        assert status["required_compiled"] == status["required_to_compile"] == 5
        body = {"task": ["color", "voted"], "inputs": ["ban red", "kolo"]}
        first = (await ask(client, **body)).json()["results"]
        text = (await ask(client, **body, mode="generate")).json()["results"]
        words = asyncio.create_task(client.get("/v1/tasks/color/words"))
        await asyncio.sleep(0.2)
        assert not words.done()  # waits for what it needs
        engine.compiler.made.update(engine.all)
        assert (await words).status_code == 200
        while {*engine.seconds} != {*engine.programs()}:
            await asyncio.sleep(0.02)
        status = (await client.get("/healthz")).json()
        assert status["compiled"] == status["to_compile"] == len(engine.all)
        again = (await ask(client, **body)).json()["results"]
        for one, other in zip(first, again, strict=True):
            assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
        assert (await ask(client, **body, mode="generate")).json()["results"][0][
            "prediction"
        ] == text[0]["prediction"]

    async def run() -> None:
        async with asyncio.timeout(60), running(service) as client:
            await test(client)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("when", "number"), [("compiling the", signal.SIGTERM), ("ready", signal.SIGINT)]
)
def test_a_server_told_to_end_does_not_wait_for_compilation(
    tmp_path: Path, when: str, number: signal.Signals
) -> None:
    """Nothing is in the cache, so that it compiles for seconds; what it leaves there is whole."""
    write_prompt(tmp_path / "one.safetensors", 3)
    arguments = ["serve", "--model", str(model_folder()), "--prompts", str(tmp_path)]
    cache = tmp_path / "cache"
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "prompt_tuning_jax", *arguments, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(when):
                break
        time.sleep(0.5)  # into the middle of it
        assert process.poll() is None
        process.send_signal(number)
        began = time.monotonic()
        assert process.wait(30) == 0
        assert time.monotonic() - began < 5  # a second, where nothing else computes
        said = process.stdout.read().splitlines()
        assert said == ["shutting down"], said
    finally:
        process.kill()
        process.wait()
    entries = [path.read_bytes() for path in cache.glob("*-cache")]
    assert entries
    for entry in entries:
        assert decompress_executable(entry)
