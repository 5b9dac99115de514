"""Adds, replaces and removes tasks while servers run."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from prompt_tuning_jax.checkpoints.prompt_file import shared_labels
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.serving.loading import for_name
from prompt_tuning_jax.serving.schema import RefusedError
from prompt_tuning_jax.serving.task_store import BusyError, StorageError, TaskStore
from prompt_tuning_jax.serving.tasks import (
    PromptValidator,
    ServedPrompt,
    ServedTask,
    Tasks,
    check_name,
)

T = TypeVar("T")
_log = logging.getLogger(__name__)
_FOLLOW = 1.0  # seconds between two checks for changes by other servers


class TaskChanges:
    """Changes ``tasks`` and their store together, and follows what other servers change there."""

    def __init__(
        self,
        tasks: Tasks,
        store: TaskStore | None,
        *,
        validator: PromptValidator,
        longest: int,
        allowed: bool,
    ) -> None:
        """``longest`` is the most positions of a prompt that is added at run time.

        Unless ``allowed``, this server changes nothing itself.
        """
        self._tasks, self._store, self._allowed = tasks, store, allowed
        self._validator = replace(validator, longest=longest)
        self._lock = asyncio.Lock()

    async def put_prompt(
        self, name: str, content: bytes, *, prompt: str | None, labels: Sequence[str]
    ) -> ServedTask:
        """Adds or replaces a task or, with ``prompt``, one of its prompts; stores it first."""
        store = self._require_store()
        _check_name(name, "name")
        _check_name(prompt or name, "prompt")
        try:
            self._validator.label_ids(labels, field="label")
        except UserError as error:
            raise RefusedError(422, str(error), field="label") from None

        def put() -> ServedTask:
            new = store.check_upload(content, self._validator, name=prompt or name)
            new = for_name(new, name, labels=labels)
            old = self._tasks.get(name) if prompt else None
            others = [] if old is None else [p for p in old.prompts if p.name != new.name]
            if any(not isinstance(other, ServedPrompt) for other in others):
                message = (
                    f"task {name!r} is {old.method if old else ''}, and only plain prompts can be "
                    "added to a task at run time; leave out prompt to replace the task"
                )
                raise RefusedError(422, message, field="prompt")
            given, new_labels = tuple(labels), new.metadata.labels
            if old is not None and not given:
                labels_by_source = {name: old.labels, "the upload": new_labels} if others else {}
                given = (
                    shared_labels(labels_by_source, instead="give the labels of all")
                    or new_labels
                    or old.labels
                )
            task = self._validator.task(name, [*others, new], given)
            store.put(task, {new.name: content})
            self._tasks.put(task)
            return task

        try:
            return await self._change(store, put)
        except UserError as error:
            raise RefusedError(422, str(error), field="body") from None

    async def remove_task(self, name: str) -> None:
        """Stops serving a task; the user's own files stay."""
        store = self._require_store()

        def remove() -> None:
            if self._tasks.get(name) is None:
                raise RefusedError(404, f"there is no task {name[:100]!r}", field="name")
            store.remove(name)
            self._tasks.remove(name)

        await self._change(store, remove)

    async def follow(self) -> None:
        """Serves what other servers of the same folder change, until it is cancelled."""
        logged = ""
        while self._store is not None:
            await asyncio.sleep(_FOLLOW)
            try:
                async with self._lock:
                    await asyncio.to_thread(self._refresh, self._store)
            except Exception as error:  # the next check may succeed
                if str(error) != logged:
                    logged = str(error)
                    _log.error("cannot read the changes of other servers: %s", logged)

    async def _change(self, store: TaskStore, change: Callable[[], T]) -> T:
        """Makes a change to the store's latest state, and returns its result."""

        def locked() -> T:
            with store.changing():
                try:
                    self._refresh(store)
                except UserError as error:  # not the client's concern
                    _log.error("%s", error)
                    raise StorageError("the list of changes cannot be read; see the log") from None
                return change()

        async with self._lock:
            try:
                return await asyncio.to_thread(locked)
            except BusyError:
                message = "another server is changing the folder"
                raise RefusedError(503, message, retry_after=1) from None
            except StorageError as error:
                _log.error("%s", error)
                raise RefusedError(507 if error.full else 500, str(error)) from None

    def _refresh(self, store: TaskStore) -> None:
        def complain(name: str, error: UserError) -> None:
            _log.error("task %s, which another server added, is not served: %s", name, error)

        tasks = store.refreshed(self._validator, complain)
        if tasks is not None:
            self._tasks.replace(tasks)

    def _require_store(self) -> TaskStore:
        if self._store is None or not self._allowed:
            raise RefusedError(404, "this server's tasks are fixed: it has no admin token")
        return self._store


def _check_name(name: str, field: str) -> None:
    try:
        check_name(name, field=field)
    except UserError as error:
        raise RefusedError(422, str(error), field=field) from None
