"""Stores the tasks that are added and removed while servers run.

``DIR/.served`` holds the uploaded prompt files, and ``tasks.json``, which names them and the
removed tasks.  That file is replaced atomically, so that a killed server leaves the old state or
the new one.  The user's own files are never touched.

Several servers may share a folder.  One changes it at a time, under a lock that ends with its
process, after it has read the changes of the others.  All follow the file as it changes.
"""

import errno
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import filelock

from prompt_tuning_jax.checkpoints.destination import PROMPT_SUFFIXES
from prompt_tuning_jax.checkpoints.prompt_file import save_prompt
from prompt_tuning_jax.checkpoints.tuned_checkpoint import is_tuned_file
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.serving.loading import for_name
from prompt_tuning_jax.serving.tasks import PromptValidator, ServedPrompt, ServedTask
from prompt_tuning_jax.storage import atomic_write
from prompt_tuning_jax.untrusted_input import json_text, read_json_file

CHANGES = ".served"
_INDEX, _LOCK = "tasks.json", ".lock"
_UPLOAD = ".upload"
_TRIES = 5  # at reading an index that another server keeps replacing

# A task in tasks.json: its labels, and its prompts' files by prompt name.
Entry: TypeAlias = Mapping[str, Any]
# Called with the name of a task and what is wrong with it.
Complain: TypeAlias = Callable[[str, UserError], None]


class StorageError(UserError):
    """The folder cannot be written or read; ``full`` if its disk is full."""

    def __init__(self, message: str, *, full: bool = False) -> None:
        super().__init__(message)
        self.full = full


class BusyError(Exception):
    """Another server holds the folder's lock for too long."""


class TaskStore:
    """The tasks that were added and removed at run time, in ``folder/.served``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / CHANGES
        self._folder_tasks: dict[str, ServedTask] = {}
        self._loaded: dict[str, tuple[Entry, ServedTask]] = {}
        self._index: dict[str, Any] = {"put": {}, "removed": []}
        self._seen: Any = None  # the stamp of the file that the index was read from
        self._read()

    def apply(
        self, tasks: Mapping[str, ServedTask], validator: PromptValidator
    ) -> dict[str, ServedTask]:
        """Returns the folder's own tasks with all changes applied to them."""
        self._folder_tasks = dict(tasks)
        return self._load(validator)

    def refreshed(
        self, validator: PromptValidator, complain: Complain
    ) -> dict[str, ServedTask] | None:
        """Returns all tasks if another server has changed something since, otherwise None.

        A task that does not fit this server is left out, and ``complain`` is called with it.
        """
        if self._stamp() == self._seen:
            return None
        return self._load(validator, complain)

    @contextmanager
    def changing(self, *, wait_seconds: float = 10.0) -> Iterator[None]:
        """Locks the folder; call ``refreshed`` before a change.

        Removes incomplete files of killed servers at the end.  StorageError if the folder cannot be
        written, BusyError after ``wait_seconds``.
        """
        with _storage():
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self._folder / _LOCK, timeout=wait_seconds)
            try:
                lock.acquire()
            except filelock.Timeout:
                raise BusyError from None
        try:
            yield
        finally:
            self._clear()
            lock.release()

    def put(self, task: ServedTask, files: Mapping[str, bytes]) -> None:
        """Stores a task; ``files`` holds the contents of its new prompts' files, by prompt name."""
        kept = dict(self._index["put"].get(task.name, {"prompts": {}})["prompts"])
        with _storage():
            for prompt, content in files.items():
                suffix = ".npy" if content.startswith(b"\x93NUMPY") else ".safetensors"
                kept[prompt] = f"{task.name}.{prompt}.{_digest(content)}{suffix}"
                with atomic_write(self._folder / kept[prompt]) as aside:
                    aside.write_bytes(content)
            for own in task.prompts:  # prompts of the user's folder beside a new one
                if own.name not in kept and isinstance(own, ServedPrompt):
                    digest = _digest(own.prompt_PD.tobytes())
                    kept[own.name] = f"{task.name}.{own.name}.{digest}.safetensors"
                    file = self._folder / kept[own.name]
                    save_prompt(file, own.prompt_PD, metadata=own.metadata, dtype=None)
        prompts = {own.name: kept[own.name] for own in task.prompts}
        entry = {"prompts": prompts, "labels": list(task.labels)}
        put = {**self._index["put"], task.name: entry}
        removed = [name for name in self._index["removed"] if name != task.name]
        self._write({"put": put, "removed": removed})
        self._loaded[task.name] = entry, task

    def remove(self, name: str) -> None:
        put = {known: kept for known, kept in self._index["put"].items() if known != name}
        # Of the folder's tasks alone: a file that is copied there later is not removed.
        removed = {*self._index["removed"], name} & self._folder_tasks.keys()
        self._write({"put": put, "removed": sorted(removed)})
        self._loaded.pop(name, None)

    def check_upload(
        self, content: bytes, validator: PromptValidator, *, name: str
    ) -> ServedPrompt:
        """Returns the prompt in an upload, validated like a file; the temporary file is removed."""
        if not content:
            raise UserError("the body is empty; send a prompt as .npy or .safetensors")
        aside = self._folder / _UPLOAD
        with _storage():
            aside.write_bytes(content)
        try:
            if is_tuned_file(aside):
                raise UserError(
                    f"{aside} holds the trained arrays of a method, and only plain prompts can be "
                    "added at run time; copy it into the folder and restart the server"
                )
            return validator.prompt(aside, name=name)
        except UserError as error:
            raise UserError(str(error).replace(str(aside), "the upload")) from None
        finally:
            with suppress(OSError):
                aside.unlink()

    def _load(
        self, validator: PromptValidator, complain: Complain | None = None
    ) -> dict[str, ServedTask]:
        """Without ``complain``, a task that does not fit is a UserError."""
        for _ in range(_TRIES):
            self._read()
            try:
                return self._tasks(validator, complain)
            except _ReplacedError:
                continue
        raise StorageError(f"{self._folder / _INDEX} changes faster than it can be read")

    def _tasks(
        self, validator: PromptValidator, complain: Complain | None
    ) -> dict[str, ServedTask]:
        tasks = {
            name: task
            for name, task in self._folder_tasks.items()
            if name not in self._index["removed"]
        }
        loaded = {}
        for name, entry in self._index["put"].items():
            known = self._loaded.get(name)
            try:
                task = (
                    known[1] if known and known[0] == entry else self._task(name, entry, validator)
                )
            except UserError as error:
                if self._stamp() != self._seen:  # its files may have been replaced meanwhile
                    raise _ReplacedError from None
                if complain is None:
                    raise
                complain(name, error)
                tasks.pop(name, None)
                continue
            loaded[name] = entry, task
            tasks[name] = task
        self._loaded = loaded
        return tasks

    def _task(self, name: str, entry: Entry, validator: PromptValidator) -> ServedTask:
        prompts = [
            for_name(
                validator.prompt(self._folder / file, name=prompt), name, labels=entry["labels"]
            )
            for prompt, file in entry["prompts"].items()
        ]
        return validator.task(name, prompts, entry["labels"])

    def _stamp(self) -> Any:
        try:
            status = (self._folder / _INDEX).stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size

    def _read(self) -> None:
        path = self._folder / _INDEX
        seen = self._stamp()  # before reading: later changes are noticed next time
        if seen is None:
            self._index, self._seen = {"put": {}, "removed": []}, None
            return
        index = read_json_file(path)
        if not _is_index(index):
            raise UserError(f"{path} is damaged: it is not an index of tasks; remove it")
        self._index, self._seen = {"put": index["put"], "removed": index["removed"]}, seen

    def _write(self, index: dict[str, Any]) -> None:
        with _storage(), atomic_write(self._folder / _INDEX) as aside:
            aside.write_text(json_text(index, indent=1) + "\n", encoding="utf-8")
        self._index, self._seen = index, self._stamp()

    def _clear(self) -> None:
        """Removes files that no task names any more, and incomplete files."""
        if self._stamp() != self._seen:  # another server may have added files
            return
        named = {file for kept in self._index["put"].values() for file in kept["prompts"].values()}
        with suppress(OSError):
            for file in [*self._folder.iterdir()]:
                unfinished = file.name == _UPLOAD or (
                    file.name.startswith(".") and file.suffix == ".tmp"
                )
                forgotten = file.suffix in PROMPT_SUFFIXES and file.name not in named
                if unfinished or forgotten:
                    with suppress(OSError):
                        file.unlink()


class _ReplacedError(Exception):
    """The index has been replaced since it was read."""


def _is_index(index: Any) -> bool:
    if not isinstance(index, dict) or not {"put", "removed"} <= index.keys():
        return False
    put, removed = index["put"], index["removed"]
    if not isinstance(put, dict) or not _are_texts(removed):
        return False
    names = [*put, *removed]
    for entry in put.values():
        if not isinstance(entry, dict) or not {"prompts", "labels"} <= entry.keys():
            return False
        prompts = entry["prompts"]
        if not isinstance(prompts, dict) or not prompts or not _are_texts([*prompts.values()]):
            return False
        if not _are_texts(entry["labels"]):
            return False
        names += [*prompts, *prompts.values()]
    return all(name not in ("", "..") and Path(name).name == name for name in names)


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


@contextmanager
def _storage() -> Iterator[None]:
    """Turns errors of the file system into StorageErrors that do not name the path."""
    try:
        yield
    except StorageError:
        raise
    except (OSError, UserError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        full = cause.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = cause.strerror or type(cause).__name__
        raise StorageError(f"the change cannot be stored: {reason}", full=full) from cause
