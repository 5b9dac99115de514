"""Rows of all requests, put together in batches: who waits, who goes next, who has gone away.

One task of the event loop decides and one thread computes.  While the device is busy rows gather;
where it is idle the first of them waits a few milliseconds for others.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from prompt_tuning_jax.serving.engine import Engine
from prompt_tuning_jax.serving.metrics import Metrics
from prompt_tuning_jax.serving.rows import Row
from prompt_tuning_jax.serving.shapes import Kind

T = TypeVar("T")
_log = logging.getLogger(__name__)
_IDLE = 0.01  # seconds between two looks at whether nothing is to be done


class QueueFullError(Exception):
    """So many rows wait that these are not taken; ``seconds`` until there may be room."""

    def __init__(self, seconds: float) -> None:
        super().__init__("too many rows are waiting")
        self.seconds = seconds


class WorkerFailedError(Exception):
    """The device's computation for this row has failed."""


@dataclass(frozen=True, kw_only=True)
class WrittenRow:
    """What was written for a row, its end included."""

    ids: list[int]
    log_prob: float


@dataclass(kw_only=True, eq=False)
class Job:
    """A row on its way; its ``future`` gets scores or a ``WrittenRow``, or was cancelled.

    Jobs of one ``owner`` fail together; ``apart`` keeps those that differ in it out of one batch.
    """

    kind: Kind
    row: Row
    future: "asyncio.Future[Any]"
    owner: Hashable
    apart: Hashable = None
    on_ids: Callable[[list[int]], None] | None = None
    alone: bool = False  # it was beside others when something failed
    since: float = 0.0
    width: int = 0  # of what the decoder looks at, once it is in a slot
    group: Hashable = field(default=None, repr=False)


class Batcher:
    """Hands jobs to the engine in batches of one length of input each."""

    def __init__(
        self, engine: Engine, metrics: Metrics, *, max_wait: float = 0.002, max_queue: int = 1024
    ) -> None:
        """``max_wait`` in seconds; ``max_queue`` in rows."""
        self._engine, self._metrics = engine, metrics
        self._max_wait, self._max_queue = max_wait, max_queue
        self._groups: dict[Hashable, deque[Job]] = {}
        self._slots: dict[int, Job] = {}
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._closing = False
        self._task: asyncio.Task[None] | None = None
        self._seconds_per_row = 0.001  # a running mean

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    @property
    def alive(self) -> bool:
        return self._task is not None and not self._task.done()

    @property
    def waiting(self) -> int:
        return sum(map(len, self._groups.values()))

    def submit(self, jobs: Sequence[Job]) -> None:
        """All of them or, with QueueFullError, none."""
        if self.waiting + len(jobs) > self._max_queue:
            self.drop_gone()
            if self.waiting + len(jobs) > self._max_queue:
                raise QueueFullError(self.waiting * self._seconds_per_row)
        now = asyncio.get_running_loop().time()
        for job in jobs:
            job.since = now
            job.group = self._group_of(job)
            self._groups.setdefault(job.group, deque()).append(job)
        self._wake.set()

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Runs something else in the engine's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def call_when_idle(
        self, function: Callable[..., T], *arguments: Any, patience: float
    ) -> T:
        """The same once nothing waits or is written, but after ``patience`` seconds in any case."""
        loop = asyncio.get_running_loop()
        end = loop.time() + patience
        while (self._groups or self._slots) and loop.time() < end:
            await asyncio.sleep(_IDLE)
        return await self.call(function, *arguments)

    async def close(self) -> None:
        """Finishes what has been taken, then ends."""
        self._closing = True
        self._wake.set()
        if self._task is not None:
            await self._task
        self._thread.shutdown()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            self.drop_gone()
            batch = self._due(loop.time())
            if batch:
                computing = {"score": self._score, "write": self._write_whole}
                await computing.get(batch[0].kind, self._admit)(batch)
            if self._slots:
                await self._write()
            elif not batch:
                if self._closing and not self._groups:
                    return
                await self._sleep(loop.time())

    async def _sleep(self, now: float) -> None:
        oldest = min((group[0].since for group in self._groups.values()), default=None)
        timeout = None if oldest is None else max(0.0, oldest + self._max_wait - now)
        try:
            await asyncio.wait_for(self._wake.wait(), timeout)
        except TimeoutError:
            return

    def _due(self, now: float) -> list[Job]:
        """The next batch, of the group whose first has waited longest; empty where none is due."""
        entering = True
        for key, group in sorted(self._groups.items(), key=lambda item: item[1][0].since):
            kind = group[0].kind
            most = self._engine.shapes.batch_sizes[-1]
            if kind == "generate":
                # Who must not be beside those in the slots enters after them, and before others.
                entering &= all(job.apart == group[0].apart for job in self._slots.values())
                if not entering:
                    continue
                most = min(most, self._engine.shapes.slots - len(self._slots))
            full = len(group) >= most or (kind == "generate" and self._slots) or self._closing
            if not most or not (full or now - group[0].since >= self._max_wait):
                continue
            rows = [job.row for job in list(group)[:most]]
            program = self._engine.program_for(kind, rows, self._engine.shapes.batch_sizes[-1])
            number = min(len(rows), self._engine.rows_at_once(program, len(rows)))
            taken = [group.popleft() for _ in range(number)]
            if not group:
                del self._groups[key]
            return taken
        return []

    async def _score(self, jobs: list[Job]) -> None:
        for job, scores in await self._computed(jobs, self._score_now):
            _answer(job, scores)

    def _score_now(self, jobs: list[Job]) -> list[list[float]]:
        rows = [job.row for job in jobs]
        return self._engine.score(rows, self._engine.usable("score", rows))

    async def _write_whole(self, jobs: list[Job]) -> None:
        for job, (ids, log_prob) in await self._computed(jobs, self._write_whole_now):
            if job.on_ids is not None and not job.future.done():
                job.on_ids(ids)
            _answer(job, WrittenRow(ids=ids, log_prob=log_prob))
            self._metrics.tokens.inc(len(ids))

    def _write_whole_now(self, jobs: list[Job]) -> list[tuple[list[int], float]]:
        rows = [job.row for job in jobs]
        return self._engine.write_whole(rows, self._engine.usable("write", rows))

    async def _admit(self, jobs: list[Job]) -> None:
        for job, slot in await self._computed(jobs, self._admit_now):
            self._slots[slot] = job

    def _admit_now(self, jobs: list[Job]) -> list[int]:
        rows = [job.row for job in jobs]
        program = self._engine.usable("generate", rows)
        free = [slot for slot in range(self._engine.shapes.slots) if slot not in self._slots]
        slots = free[: len(jobs)]
        self._engine.prefill(rows, slots, program)
        for job in jobs:
            job.width = program.prompt_length + program.length
        return slots

    async def _write(self) -> None:
        given_up = [slot for slot, job in self._slots.items() if job.future.done()]
        for slot in given_up:
            del self._slots[slot]
        width = max((job.width for job in self._slots.values()), default=0)
        slots = max(self._slots, default=0) + 1

        def write() -> Any:
            return self._engine.write(slots=slots, width=width, given_up=given_up)

        try:
            seen = await self.call(write)
        except Exception as error:
            _log.exception("a step of writing has failed")
            await self._empty_slots(error)
            return
        written = 0
        for slot, job in list(self._slots.items()):
            number = int(seen.position_M[slot])
            ids = seen.ids_MS[slot][:number].tolist()
            if job.on_ids is not None and not job.future.done():
                job.on_ids(ids)
            if seen.done_M[slot]:
                _answer(job, WrittenRow(ids=ids, log_prob=float(seen.score_M[slot])))
                written += number
                del self._slots[slot]
        self._metrics.tokens.inc(written)

    async def _computed(
        self, jobs: list[Job], compute: Callable[[list[Job]], list[T]]
    ) -> list[tuple[Job, T]]:
        """Each job with its result; where a batch fails, each owner's jobs are tried alone."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            results = await self.call(compute, jobs)
        except Exception as error:
            await self._repair(error)
            owners = list(dict.fromkeys(job.owner for job in jobs))
            if len(owners) == 1:
                _log.exception("a batch of %d rows has failed", len(jobs))
                self._metrics.failures.inc()
                for job in jobs:
                    _fail(job, error)
                return []
            found = []
            for owner in owners:
                own = [job for job in jobs if job.owner == owner and not job.future.done()]
                if own:
                    part = await self._computed(own, compute)
                    # A slot that is taken must be seen to be taken by the next owner's.
                    if own[0].kind == "generate":
                        self._slots.update({slot: job for job, slot in part})  # type: ignore[misc]
                    found += part
            return found
        seconds = loop.time() - began
        self._metrics.batch(jobs[0].kind, len(jobs), seconds)
        self._metrics.waited(began - job.since for job in jobs)
        self._seconds_per_row += 0.1 * (seconds / len(jobs) - self._seconds_per_row)
        return list(zip(jobs, results, strict=True))

    async def _repair(self, error: Exception) -> None:
        """What a failed program had been given may be gone."""
        if self._engine.table is None:
            await self._empty_slots(error)
        else:
            await self.call(self._engine.cache.clear)

    async def _empty_slots(self, error: Exception) -> None:
        """Each row that was being written begins again, by itself; one that was by itself fails."""
        lost, self._slots = self._slots, {}
        await self.call(self._engine.reset)
        for job in lost.values():
            if job.alone:
                self._metrics.failures.inc()
                _fail(job, error)
            elif not job.future.done():
                job.alone = True
                job.apart = object()
                job.group = self._group_of(job)
                self._groups[job.group] = deque([job])

    def _group_of(self, job: Job) -> Hashable:
        program = self._engine.program_for(job.kind, [job.row], 1)
        return job.kind, program.length, program.targets, job.apart

    def drop_gone(self) -> None:
        """Takes out of the queue what nobody waits for any more."""
        for key, group in list(self._groups.items()):
            if any(job.future.done() for job in group):
                self._groups[key] = group = deque(job for job in group if not job.future.done())
                if not group:
                    del self._groups[key]


def _answer(job: Job, result: Any) -> None:
    if not job.future.done():
        job.future.set_result(result)


def _fail(job: Job, error: Exception) -> None:
    if not job.future.done():
        job.future.set_exception(WorkerFailedError(type(error).__name__))
