"""What is kept of changes, of several servers on one folder, and where the disk is full."""

import asyncio
import contextlib
import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from prompt_tuning_jax.checkpoints.prompt_file import PromptMetadata
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.serving.service import Service
from prompt_tuning_jax.serving.task_store import BusyError, StorageError, TaskStore
from prompt_tuning_jax.storage import natural_order
from tests.serving.serving_app import ADMIN, make_service, running, validator
from tests.serving.serving_micro import made_prompt, write_prompt
from tests.tiny_run import LABELS, ROOT


def put(kept: TaskStore, name: str, content: bytes, *, labels: tuple[str, ...] = ()) -> None:
    with kept.changing():
        kept.refreshed(validator(), complain)
        prompt = kept.check_upload(content, validator(), name="p")
        kept.put(validator().task(name, [prompt], labels), {"p": content})


def complain(name: str, error: UserError) -> None:
    raise AssertionError(f"{name}: {error}")


def names_in(folder: Path) -> list[str]:
    return [*TaskStore(folder).apply({}, validator())]


def files_in(folder: Path) -> list[str]:
    return sorted(file.name for file in (folder / ".served").iterdir() if file.name != ".lock")


@pytest.fixture
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_prompt(tmp_path_factory.mktemp("elsewhere") / "new.npy").read_bytes()


ENTRY = '{"labels": [], "prompts": {"p": "x.npy"}}'


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        "null",
        '{"put": {}}',
        '{"removed": {}, "put": {}}',
        '{"removed": [1], "put": {}}',
        '{"removed": [], "put": []}',
        '{"removed": [], "put": {"a": 1}}',
        '{"removed": [], "put": {"a": {"prompts": {"p": "x.npy"}}}}',
        '{"removed": [], "put": {"a": {"labels": "ab", "prompts": {"p": "x.npy"}}}}',
        '{"removed": [], "put": {"a": {"labels": [], "prompts": {}}}}',
        '{"removed": [], "put": {"a": {"labels": [], "prompts": {"p": 1}}}}',
        '{"removed": [], "put": {"a": {"labels": [], "prompts": {"p": "../../x.npy"}}}}',
        '{"removed": [], "put": {"..": ' + ENTRY + "}}",
        '{"removed": [], "put": {"a/b": ' + ENTRY + "}}",
        "[" * 100_000,
        '{"removed": [], "put": {"a": ' + "1" * 5000 + "}}",
        '{"removed": ["\\ud800"], "put": {}}',
        "\x00",
    ],
)
def test_a_damaged_index_is_one_line(tmp_path: Path, index: str) -> None:
    (tmp_path / ".served").mkdir()
    (tmp_path / ".served" / "tasks.json").write_text(index)
    with pytest.raises(UserError, match=r"tasks\.json") as raised:
        TaskStore(tmp_path)
    assert len(str(raised.value).splitlines()) == 1


def test_two_servers_keep_what_each_has_put(tmp_path: Path, content: bytes) -> None:
    """The second was opened before the first wrote anything."""
    one, other = TaskStore(tmp_path), TaskStore(tmp_path)
    own = {"plain": validator().task("plain", [made_prompt(3)])}
    for kept in (one, other):
        kept.apply(own, validator())
    put(one, "first", content)
    put(other, "second", content, labels=LABELS)
    with one.changing():
        tasks = one.refreshed(validator(), complain)
        assert tasks is not None and [*tasks] == ["plain", "first", "second"]
        assert tasks["second"].labels == LABELS
        one.remove("plain")
    tasks = other.refreshed(validator(), complain)
    assert tasks is not None and [*tasks] == ["first", "second"]
    assert other.refreshed(validator(), complain) is None  # nothing since
    assert names_in(tmp_path) == ["first", "second"]
    assert len(files_in(tmp_path)) == 3


def test_what_another_server_put_and_does_not_fit_is_left_out(
    tmp_path: Path, content: bytes
) -> None:
    kept = TaskStore(tmp_path)
    kept.apply({"long": validator().task("long", [made_prompt(3)])}, validator())
    put(TaskStore(tmp_path), "short", content)
    longer = write_prompt(tmp_path / "elsewhere" / "long.npy", 9).read_bytes()
    put(TaskStore(tmp_path), "long", longer)
    said: list[str] = []
    strict = validator()
    strict = type(strict)(**{**vars(strict), "longest": 7})
    tasks = kept.refreshed(strict, lambda name, error: said.append(f"{name}: {error}"))
    assert tasks is not None and [*tasks] == ["short"]
    assert len(said) == 1 and said[0].startswith("long: ") and "9 positions" in said[0]


def test_a_lock_is_waited_for_and_ends_with_its_process(tmp_path: Path, content: bytes) -> None:
    script = """
import sys, time
from pathlib import Path
from prompt_tuning_jax.serving.task_store import TaskStore
with TaskStore(Path(sys.argv[1])).changing():
    (Path(sys.argv[1]) / ".served" / ".tasks.json.123.tmp").write_text("half of it")
    print("inside", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "inside\n"
        kept = TaskStore(tmp_path)
        with pytest.raises(BusyError), kept.changing(wait_seconds=0.2):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]
    put(kept, "mine", content)
    assert names_in(tmp_path) == ["mine"]
    assert len(files_in(tmp_path)) == 2  # the half of it is gone


def _put_ten(folder: str, name: str, content: bytes) -> None:
    kept = TaskStore(Path(folder))
    kept.apply({}, validator())
    for number in range(10):
        put(kept, f"{name}{number}", content)


def test_processes_that_change_a_folder_at_once_lose_nothing(
    tmp_path: Path, content: bytes
) -> None:
    context = multiprocessing.get_context("spawn")
    other = context.Process(target=_put_ten, args=(str(tmp_path), "a", content))
    other.start()
    while other.is_alive() and not (tmp_path / ".served" / "tasks.json").exists():
        time.sleep(0.001)
    _put_ten(str(tmp_path), "b", content)
    other.join(120)
    assert other.exitcode == 0
    assert sorted(names_in(tmp_path)) == sorted(f"{a}{n}" for a in "ab" for n in range(10))


FAILING: dict[str, Callable[[Any], Any]] = {
    "the upload": lambda error: (Path, "write_bytes", error),
    "the index": lambda error: (Path, "write_text", error),
    "syncing": lambda error: (os, "fsync", error),
    "renaming": lambda error: (os, "replace", error),
}


@contextlib.contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, where: str, code: int) -> Iterator[None]:
    def fail(*_: object, **__: object) -> Any:
        raise OSError(code, os.strerror(code))

    place, name, function = FAILING[where](fail)
    with monkeypatch.context() as patch:
        patch.setattr(place, name, function)
        yield


@pytest.mark.parametrize(
    ("where", "code"),
    [
        ("the upload", errno.ENOSPC),
        ("the upload", errno.EROFS),
        ("the index", errno.EACCES),
        ("the index", errno.EDQUOT),
        ("syncing", errno.ENOSPC),
        ("syncing", errno.EACCES),
        ("renaming", errno.EROFS),
        ("renaming", errno.EDQUOT),
    ],
)
def test_a_folder_that_takes_no_changes_is_one_line_and_keeps_the_old_state(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, where: str, code: int
) -> None:
    folder = tmp_path / "tasks"
    write_prompt(folder / "own.npy")

    async def run() -> None:
        service: Service = make_service(folder)
        async with running(service) as client:

            async def change(method: str, name: str) -> httpx.Response:
                path = f"/v1/tasks/{name}"
                return await client.request(method, path, content=content, headers=ADMIN)

            assert (await change("PUT", "first")).status_code == 200
            before = files_in(folder), (folder / ".served" / "tasks.json").read_bytes()
            with failing(monkeypatch, where, code):
                methods = ["PUT"] if where == "the upload" else ["PUT", "DELETE"]
                for method in methods:
                    answer = await change(method, "first" if method == "DELETE" else "second")
                    full = code in (errno.ENOSPC, errno.EDQUOT)
                    assert answer.status_code == (507 if full else 500)
                    message = answer.json()["error"]["message"]
                    assert os.strerror(code) in message and str(tmp_path) not in message
                    assert len(message.splitlines()) == 1
            assert (files_in(folder), (folder / ".served" / "tasks.json").read_bytes()) == before
            assert service.tasks.names() == ["first", "own"]
            assert (await change("PUT", "second")).status_code == 200

    asyncio.run(run())
    assert sorted(names_in(folder)) == ["first", "second"]


def test_a_folder_that_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    (tmp_path / ".served").write_text("a file where a folder should be")
    with pytest.raises(StorageError, match="cannot be stored"), TaskStore(tmp_path).changing():
        pass


def test_a_damaged_index_while_the_server_runs(tmp_path: Path, content: bytes) -> None:
    """It goes on with what it has, and changes nothing."""

    async def run() -> None:
        service = make_service(tmp_path)
        async with running(service) as client:
            assert (
                await client.put("/v1/tasks/first", content=content, headers=ADMIN)
            ).status_code == 200
            index = tmp_path / ".served" / "tasks.json"
            whole = index.read_bytes()
            index.write_bytes(b"{")
            answer = await client.put("/v1/tasks/second", content=content, headers=ADMIN)
            assert answer.status_code == 500 and "see the log" in answer.text
            assert str(tmp_path) not in answer.text
            assert service.tasks.names() == ["first"]
            index.write_bytes(whole)
            answer = await client.put("/v1/tasks/second", content=content, headers=ADMIN)
            assert answer.status_code == 200

    asyncio.run(run())
    assert names_in(tmp_path) == ["first", "second"]


def test_servers_of_one_folder_follow_each_other(tmp_path: Path, content: bytes) -> None:
    """One of them may change nothing itself."""

    async def run() -> None:
        one, reader = make_service(tmp_path), make_service(tmp_path, allow_changes=False)
        async with asyncio.timeout(30), running(one) as client, running(reader):
            await client.put("/v1/tasks/new", content=content, headers=ADMIN)
            while reader.tasks.names() != ["new"]:
                await asyncio.sleep(0.05)
            await client.delete("/v1/tasks/new", headers=ADMIN)
            while reader.tasks.names():
                await asyncio.sleep(0.05)

    asyncio.run(run())


def test_a_file_that_comes_after_a_removal_is_served(tmp_path: Path, content: bytes) -> None:
    """Only tasks of the folder stay removed."""

    async def change(change: str) -> None:
        async with running(make_service(tmp_path)) as client:
            if change == "put":
                await client.put("/v1/tasks/mine", content=content, headers=ADMIN)
            answer = await client.delete("/v1/tasks/mine", headers=ADMIN)
            assert answer.status_code == 204

    asyncio.run(change("put"))
    (tmp_path / "mine.safetensors").write_bytes(content)
    assert make_service(tmp_path).tasks.names() == ["mine"]
    asyncio.run(change("delete"))
    assert make_service(tmp_path).tasks.names() == []


def test_a_reader_whose_files_are_replaced_meanwhile_reads_again(
    tmp_path: Path, content: bytes
) -> None:
    """Hundreds of replacements beside it: it sees one state or the next, and no missing file."""
    put(TaskStore(tmp_path), "task", content)
    other = write_prompt(tmp_path / "elsewhere" / "other.npy", seed=9).read_bytes()
    done = threading.Event()

    def change() -> None:
        kept = TaskStore(tmp_path)
        kept.apply({}, validator())
        for number in range(40):
            put(kept, "task", content if number % 2 else other)
        done.set()

    changing = threading.Thread(target=change)
    changing.start()
    while not done.is_set():
        with contextlib.suppress(StorageError):  # it changes faster than it can be read
            assert names_in(tmp_path) == ["task"]
    changing.join()


def test_a_new_prompt_beside_those_of_the_users_folder(tmp_path: Path) -> None:
    """All of the task is kept then, as it was served."""
    old, new = made_prompt(3, seed=1), made_prompt(4, seed=2)
    content = write_prompt(tmp_path / "new.npy").read_bytes()
    kept = TaskStore(tmp_path)
    with kept.changing():
        kept.put(validator().task("both", [old, new], LABELS), {"seed_2": content})
    (task,) = TaskStore(tmp_path).apply({}, validator()).values()
    np.testing.assert_array_equal(task.prompts[0].prompt_PD, old.prompt_PD)
    assert [prompt.name for prompt in task.prompts] == ["seed_1", "seed_2"]
    assert task.prompts[0].metadata == PromptMetadata(
        created_by=task.prompts[0].metadata.created_by
    )


@pytest.mark.parametrize(
    "metadata",
    [
        {"steps": "1" * 5000},
        {"score": "1" * 5000},
        {"labels": "[" * 100_000},
        {"labels": '["\\ud800"]'},
        {"labels": "[" + "1" * 5000 + "]"},
        {"seed": "-" + "9" * 400},
        {"labels": "NaN"},
        {"combine": "../.."},
    ],
)
def test_uploads_whose_metadata_a_reader_may_choke_on(
    tmp_path: Path, metadata: dict[str, str]
) -> None:
    header = {
        "__metadata__": {"format": "prompt_tuning_jax", **metadata},
        "prompt": {"dtype": "F32", "shape": [1, 16], "data_offsets": [0, 64]},
    }
    text = json.dumps(header).encode()
    body = len(text).to_bytes(8, "little") + text + bytes(64)

    async def run() -> None:
        service = make_service(tmp_path)
        async with running(service) as client:
            answer = await client.put("/v1/tasks/new", content=body, headers=ADMIN)
            # A number that is merely large may be taken; then it must not come out as no JSON.
            listed = await client.get("/v1/tasks")
            assert listed.status_code == 200 and "NaN" not in listed.text
            assert "Infinity" not in listed.text
            if answer.status_code != 200:
                assert answer.status_code in (413, 422), answer.text
                assert len(answer.json()["error"]["message"].splitlines()) == 1
                assert not service.tasks.names() and not files_in(tmp_path)

    asyncio.run(run())
    names_in(tmp_path)  # whatever was taken can be read again


def test_names_are_in_natural_order() -> None:
    names = ["10²", "a", "seed_10", "seed_2", "²", "3"]
    assert sorted(names, key=natural_order) == ["3", "10²", "a", "seed_2", "seed_10", "²"]
