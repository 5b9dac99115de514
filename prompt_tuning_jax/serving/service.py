"""Requests to rows and back: the server without its network."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from prompt_tuning_jax.data.tasks.wording import Given
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.serving.batcher import Batcher, Job, QueueFullError, WorkerFailedError
from prompt_tuning_jax.serving.changes import BusyError, StorageError, TaskStore
from prompt_tuning_jax.serving.compiling import CompilationStoppedError
from prompt_tuning_jax.serving.engine import Engine
from prompt_tuning_jax.serving.jobs import Follow, jobs_of
from prompt_tuning_jax.serving.limits import Limits, RefusedError
from prompt_tuning_jax.serving.metrics import Metrics
from prompt_tuning_jax.serving.postprocess import assembled
from prompt_tuning_jax.serving.request_parser import Reader, Wanted, too_many_rows
from prompt_tuning_jax.serving.schema import PredictRequest, Result
from prompt_tuning_jax.serving.task_store import for_name
from prompt_tuning_jax.serving.tasks import (
    PromptValidator,
    ServedPrompt,
    ServedTask,
    Tasks,
    check_name,
)

T = TypeVar("T")
_log = logging.getLogger(__name__)
_COMPILED = 0.1  # seconds between two looks for programs that have been compiled
_PATIENCE = 2.0  # seconds that a new program waits for a moment when nothing else is to be done
_FOLLOW = 1.0  # seconds between two looks at what other servers have changed
_LONG = 20_000  # characters, from which on others need not wait for the tokeniser


class Service:
    """Answers requests with one engine; ``state`` is starting, ready or draining."""

    def __init__(
        self,
        engine: Engine,
        tasks: Tasks,
        *,
        validator: PromptValidator,
        kept: TaskStore | None = None,
        changes: bool = False,
        limits: Limits | None = None,
        model_name: str = "",
        apart: bool = False,
    ) -> None:
        """``changes`` allows this server to change what is ``kept``, which others may as well.

        ``apart`` computes each task in batches of its own, to compare with.
        """
        self.engine, self.tasks, self.validator = engine, tasks, validator
        self.limits = limits or Limits()
        self.model_name = model_name
        self.metrics = Metrics()
        self.metrics.tasks.set_function(lambda: len(self.tasks))
        self.metrics.cache_hits.set_function(lambda: self.engine.cache.hits)
        self.metrics.cache_misses.set_function(lambda: self.engine.cache.misses)
        self.on_compiled: Callable[[], None] = lambda: None  # once all programs are in use
        self.state = "starting"
        self._kept, self._changes, self._apart = kept, changes, apart
        self._beside: list[asyncio.Task[None]] = []  # what goes on beside requests
        self._changing = asyncio.Lock()
        self._reader = Reader(engine, tasks, validator=validator, limits=self.limits)

    async def start(self, report: Callable[[str], None] = lambda name: None) -> None:
        """Compiles what every request can be answered with, then is ready; the rest follows."""
        self.batcher = Batcher(
            self.engine,
            self.metrics,
            max_wait=self.limits.wait_seconds,
            max_queue=self.limits.waiting_rows,
        )
        self.metrics.waiting.set_function(lambda: self.batcher.waiting)
        if self.state != "draining":  # told to end before it has begun
            await self.batcher.call(self.engine.compile_first, report)
        self.batcher.start()
        self._beside.append(asyncio.create_task(self._measure()))
        if self._kept is not None:
            self._beside.append(asyncio.create_task(self._follow_others(self._kept)))
        if self.state == "starting":
            self.state = "ready"

    def drain(self) -> None:
        """Takes no more; what has been taken is answered."""
        self.state = "draining"
        self.engine.compiler.stop()

    async def close(self) -> None:
        """Answers what it has taken, and takes no more."""
        self.drain()
        for task in self._beside:
            task.cancel()
        await self.batcher.close()

    async def _measure(self) -> None:
        """Makes use of programs that were compiled since, in moments when nobody waits."""
        while self.engine.compiler.is_running:
            while await self.batcher.call_when_idle(self.engine.measure, patience=_PATIENCE):
                pass
            await asyncio.sleep(_COMPILED)
        while await self.batcher.call_when_idle(self.engine.measure, patience=_PATIENCE):
            pass
        self.on_compiled()

    async def predict(self, request: PredictRequest) -> list[Result]:
        """One result for each input; RefusedError where there is none."""
        wanted = await self._wanted(request)
        jobs = self._jobs(request, wanted)
        try:
            async with asyncio.timeout(self._seconds(request)):
                self._submit([job for own in jobs for job in own])
                values = [[await job.future for job in own] for own in jobs]
        except TimeoutError:
            raise RefusedError(
                504, "the deadline has passed", field="options.deadline_ms"
            ) from None
        except WorkerFailedError:
            raise RefusedError(500, "the computation has failed; other requests go on") from None
        finally:
            self._give_up(jobs)
        return self._assembled(request, wanted, values)

    async def stream(self, request: PredictRequest) -> AsyncIterator[dict[str, Any]]:
        """Pieces of text as they are written, then ``{"results": [...]}`` or ``{"error": ...}``.

        What refuses a request is raised before the first piece.
        """
        wanted = await self._wanted(request)
        pieces: asyncio.Queue[tuple[int, str, list[int]] | None] = asyncio.Queue()

        def follow(index: int, prompt: str) -> Callable[[list[int]], None]:
            return lambda ids: pieces.put_nowait((index, prompt, ids))

        jobs = self._jobs(request, wanted, follow)
        every = [job for own in jobs for job in own]
        self._submit(every)

        async def finished() -> None:
            await asyncio.wait([job.future for job in every], timeout=self._seconds(request))
            pieces.put_nowait(None)

        ending = asyncio.create_task(finished())
        said: dict[tuple[int, str], str] = {}
        try:
            while (piece := await pieces.get()) is not None:
                index, prompt, ids = piece
                before = said.get((index, prompt), "")
                # The last character may be half of one.
                text = self.engine.vocabulary.decode(ids).rstrip("\ufffd")
                if text.startswith(before) and text != before:
                    said[index, prompt] = text
                    yield {"index": index, "prompt": prompt, "text": text[len(before) :]}
            if not all(job.future.done() for job in every):
                yield {"error": {"message": "the deadline has passed"}}
                return
            try:
                values = [[job.future.result() for job in own] for own in jobs]
            except WorkerFailedError:
                yield {"error": {"message": "the computation has failed; other requests go on"}}
                return
            results = self._assembled(request, wanted, values)
            yield {"results": [one.model_dump(exclude_none=True) for one in results]}
        finally:
            ending.cancel()
            self._give_up(jobs)

    async def put_prompt(
        self, name: str, content: bytes, *, prompt: str | None, labels: Sequence[str]
    ) -> ServedTask:
        """Adds or replaces a task, or with ``prompt`` one of its prompts; kept on disk first."""
        kept = self._require_kept()
        _checked_name(name, "name")
        _checked_name(prompt or name, "prompt")

        def made() -> ServedTask:
            new = kept.check_upload(content, self._uploads, name=prompt or name)
            new = for_name(new, name, labels=labels)
            old = self.tasks.get(name) if prompt else None
            others = [] if old is None else [p for p in old.prompts if p.name != new.name]
            if any(not isinstance(other, ServedPrompt) for other in others):
                raise UserError(
                    f"task {name!r} is {old.method if old else ''}, and only plain prompts "
                    "are added beside others at run time; leave out prompt to replace the task"
                )
            given = tuple(labels) or (old.labels if old is not None else ())
            task = self.validator.task(name, [*others, new], given)
            kept.put(task, {new.name: content})
            self.tasks.put(task)
            return task

        try:
            return await self._changed(kept, made)
        except UserError as error:
            raise RefusedError(422, str(error), field="body") from None

    async def remove_task(self, name: str) -> None:
        """No longer serves a task; its file stays where it is the user's."""
        kept = self._require_kept()

        def removed() -> None:
            if self.tasks.get(name) is None:
                raise RefusedError(404, f"there is no task {name[:100]!r}", field="name")
            kept.remove(name)
            self.tasks.remove(name)

        await self._changed(kept, removed)

    async def _changed(self, kept: TaskStore, change: Callable[[], T]) -> T:
        """What a change gives back, made to what all servers of the folder have left of it."""

        def alone() -> T:
            with kept.changing():
                try:
                    self._follow_now(kept)
                except UserError as error:  # of no concern to who asks
                    _log.error("%s", error)
                    raise StorageError("the list of changes cannot be read; see the log") from None
                return change()

        async with self._changing:
            try:
                return await asyncio.to_thread(alone)
            except BusyError:
                message = "another server is changing the folder"
                raise RefusedError(503, message, retry_after=1) from None
            except StorageError as error:
                _log.error("%s", error)
                raise RefusedError(507 if error.full else 500, str(error)) from None

    async def _follow_others(self, kept: TaskStore) -> None:
        """Serves what other servers of the same folder are given, for ever."""
        said = ""
        while True:
            await asyncio.sleep(_FOLLOW)
            try:
                async with self._changing:
                    await asyncio.to_thread(self._follow_now, kept)
            except (OSError, UserError) as error:
                if str(error) != said:
                    said = str(error)
                    _log.error("changes of other servers cannot be read: %s", said)

    def _follow_now(self, kept: TaskStore) -> None:
        def complain(name: str, error: UserError) -> None:
            _log.error("task %s, which another server was given, is not served: %s", name, error)

        tasks = kept.refreshed(self._uploads, complain)
        if tasks is not None:
            self.tasks.replace(tasks)

    @property
    def _uploads(self) -> PromptValidator:
        """What a prompt must be that comes while the server runs."""
        return replace(self.validator, longest=self.engine.shapes.prompt_lengths[-1])

    async def nearest_words(self, name: str) -> list[tuple[str, list[list[tuple[str, float]]]]]:
        """For each prompt of a task, for each position, words and their cosines."""
        self._require_ready()
        task = self.tasks.get(name)
        if task is None:
            raise RefusedError(404, f"there is no task {name[:100]!r}", field="name")
        decode = self.engine.vocabulary.decode
        found = []
        prompts = [prompt for prompt in task.prompts if isinstance(prompt, ServedPrompt)]
        if not prompts:
            message = f"task {name!r} has no prompt, and so no positions; it is {task.method}"
            raise RefusedError(422, message, field="name")
        await self._require_made("nearest")
        for prompt in prompts:
            ids_PK, cosines_PK = await self.batcher.call(self.engine.nearest_words, prompt)
            positions = [
                [
                    (decode([int(i)]) or f"<{i}>", round(float(cosine), 4))
                    for i, cosine in zip(ids_K, cosines_K, strict=True)
                ]
                for ids_K, cosines_K in zip(ids_PK, cosines_PK, strict=True)
            ]
            found.append((prompt.name, positions))
        return found

    async def _require_made(self, key: Hashable) -> None:
        """Waits for what is compiled beside requests, before other such things."""
        compiler = self.engine.compiler
        compiler.want(key)
        try:
            async with asyncio.timeout(self.limits.deadline_seconds):
                while not compiler.is_made(key):
                    await asyncio.sleep(_COMPILED)
        except (TimeoutError, CompilationStoppedError):
            message = "what this needs is not compiled yet"
            raise RefusedError(503, message, retry_after=10) from None

    def _require_ready(self) -> None:
        if self.state != "ready":
            raise RefusedError(503, f"the server is {self.state}", retry_after=1)

    def _require_kept(self) -> TaskStore:
        if self._kept is None or not self._changes:
            raise RefusedError(404, "this server's tasks are fixed: it has no admin token")
        return self._kept

    async def _wanted(self, request: PredictRequest) -> list[Wanted]:
        self._require_ready()
        if sum(map(_length, request.inputs)) < _LONG:
            return self._reader.read(request)
        return await asyncio.to_thread(self._reader.read, request)

    def _jobs(
        self, request: PredictRequest, wanted: Sequence[Wanted], follow: Follow | None = None
    ) -> list[list[Job]]:
        shapes = self.engine.shapes
        return jobs_of(
            request.mode,
            wanted,
            shapes=shapes,
            methods=self.engine.methods,
            apart=self._apart,
            follow=follow,
        )

    def _submit(self, jobs: Sequence[Job]) -> None:
        if len(jobs) > self.limits.waiting_rows:
            raise too_many_rows(len(jobs), self.limits)
        try:
            self.batcher.submit(jobs)
        except QueueFullError as error:
            seconds = max(1, round(error.seconds))
            raise RefusedError(
                429, "too many rows are waiting", field="inputs", retry_after=seconds
            ) from None

    def _assembled(
        self, request: PredictRequest, wanted: Sequence[Wanted], values: list[list[Any]]
    ) -> list[Result]:
        decode = self.engine.vocabulary.decode
        found = [
            assembled(
                request.mode,
                task=one.task.name,
                prompts=[p.name if p is not None else "" for p in one.prompts],
                labels=one.labels,
                values=own,
                decode=decode,
                divisors=[len(ids) for ids in one.targets]
                if request.options.normalize_length
                else (),
            )
            for one, own in zip(wanted, values, strict=True)
        ]
        for result, one in zip(found, wanted, strict=True):
            result.truncated = one.truncated or None
        return found

    def _give_up(self, jobs: Sequence[Sequence[Job]]) -> None:
        """Whoever asked has gone: what is not computed yet need not be."""
        every = [job for own in jobs for job in own]
        for job in every:
            # One that is done is looked at, so that asyncio does not complain.
            if not job.future.cancel() and not job.future.cancelled():
                job.future.exception()
        if any(job.future.cancelled() for job in every):
            self.batcher.drop_gone()

    def _seconds(self, request: PredictRequest) -> float:
        asked = request.options.deadline_ms
        most = self.limits.deadline_seconds
        return most if asked is None else min(most, asked / 1000)


def _length(given: Given) -> int:
    """About how many characters."""
    values = [given] if isinstance(given, str) else given.values()
    return sum(len(value) for value in values if isinstance(value, str))


def _checked_name(name: str, field: str) -> None:
    try:
        check_name(name, field=field)
    except UserError as error:
        raise RefusedError(422, str(error), field=field) from None
