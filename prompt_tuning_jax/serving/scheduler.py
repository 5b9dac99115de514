"""Batches the rows of all requests: which wait, which are next, which nobody wants any more.

One task of the event loop schedules and one thread computes.  Rows gather while the device is busy;
if it is idle, the first row waits a few milliseconds for others.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from prompt_tuning_jax.serving.decode_state import DecodeOutput
from prompt_tuning_jax.serving.engine import Engine
from prompt_tuning_jax.serving.metrics import Metrics
from prompt_tuning_jax.serving.shapes import Kind, Program, Row
from prompt_tuning_jax.serving.tasks import AdapterSpec

T = TypeVar("T")
_log = logging.getLogger(__name__)
_IDLE = 0.01  # seconds between two checks whether the device is idle


class QueueFullError(Exception):
    """The queue has no room for these rows; ``seconds`` until it may have."""

    def __init__(self, seconds: float) -> None:
        super().__init__("too many rows are waiting")
        self.seconds = seconds


class WorkerFailedError(Exception):
    """The device's computation for this row has failed."""


@dataclass(frozen=True, kw_only=True)
class GeneratedRow:
    """The tokens generated for a row, the end included."""

    ids: list[int]
    log_prob: float


@dataclass(kw_only=True, eq=False)
class Job:
    """A row to compute; its ``future`` gets scores or a ``GeneratedRow``, or is cancelled.

    Jobs of one ``owner`` fail together.  Jobs that differ in ``apart`` are never computed together.
    ``on_ids`` is called with the tokens of a text so far, every few tokens.
    """

    kind: Kind
    row: Row
    future: "asyncio.Future[Any]"
    owner: Hashable
    apart: Hashable = None
    on_ids: Callable[[list[int]], None] | None = None
    alone: bool = False  # it is retried alone after others beside it made a step fail
    since: float = 0.0
    group: Hashable = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Jobs of one ``group`` and the compiled program that computes them."""

    jobs: list[Job]
    program: Program


class Scheduler:
    """Hands jobs to the engine in batches of one ``batch_key`` and one length of input each.

    Texts are decoded continuously: rows of any key join and leave the slots between two steps.
    """

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
        """Queues all of them or, with QueueFullError, none."""
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
        """Runs a function in the engine's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def call_when_idle(
        self, function: Callable[..., T], *arguments: Any, patience: float
    ) -> T:
        """Does so once nothing waits or is decoded, at the latest after ``patience`` seconds."""
        loop = asyncio.get_running_loop()
        end = loop.time() + patience
        while (self._groups or self._slots) and loop.time() < end:
            await asyncio.sleep(_IDLE)
        return await self.call(function, *arguments)

    async def close(self) -> None:
        """Finishes all queued jobs, then stops without waiting for other calls."""
        self._closing = True
        self._wake.set()
        if self._task is not None:
            await asyncio.wait([self._task])
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            self.drop_gone()
            batch = self._due(loop.time())
            if batch is not None and batch.program.kind == "score":
                await self._score(batch)
            elif batch is not None:
                await self._prefill(batch)
            if self._slots:
                await self._decode()
            elif batch is None:
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

    def _due(self, now: float) -> _Batch | None:
        """Returns the next batch if one is due.

        It is of the group whose first job has waited longest.
        """
        slots = [*self._slots.values()]
        joining = True
        held_back: set[AdapterSpec | None] = set()
        for key, group in sorted(self._groups.items(), key=lambda item: item[1][0].since):
            kind, largest = group[0].kind, self._engine.shapes.batch_sizes[-1]
            most = largest
            if kind == "generate":
                # A row that must stay apart waits for all slots, and every later row waits for it.
                joining &= all(job.apart == group[0].apart for job in slots)
                # One whose method does not fit on the device waits for others of the same spec.
                spec = group[0].row.adapter_spec
                if not self._engine.can_decode([job.row for job in (*slots, group[0])]):
                    held_back.add(spec)
                if not joining or spec in held_back:
                    continue
                single = self._engine.program_for(kind, [group[0].row], 1)
                most = min(most, len(self._free_slots(single)))
            full = len(group) >= most or (kind == "generate" and slots) or self._closing
            if not most or not (full or now - group[0].since >= self._max_wait):
                continue
            rows = [job.row for job in list(group)[:most]]
            program = self._engine.program_for(kind, rows, largest)
            number = min(len(rows), self._engine.rows_at_once(program, len(rows)))
            program = self._engine.usable(kind, rows[:number])
            if kind == "generate":  # a thread may have compiled what fills other slots just now
                number = min(number, len(self._free_slots(program)))
            taken = [group.popleft() for _ in range(number)]
            if not group:
                del self._groups[key]
            if taken:
                return _Batch(jobs=taken, program=program)
        return None

    def _free_slots(self, program: Program) -> list[int]:
        return [slot for slot in self._engine.slots_for(program) if slot not in self._slots]

    async def _score(self, batch: _Batch) -> None:
        def score(jobs: list[Job]) -> list[list[float]]:
            return self._engine.score([job.row for job in jobs], batch.program)

        await self._compute(batch.jobs, score, _answer)

    async def _prefill(self, batch: _Batch) -> None:
        def occupy(job: Job, slot: int) -> None:
            self._slots[slot] = job

        await self._compute(batch.jobs, partial(self._prefill_now, batch.program), occupy)

    def _prefill_now(self, program: Program, jobs: list[Job]) -> list[int]:
        free = self._free_slots(program)
        # Prompts fill slots from the first and methods from the last, so that each batch of slots
        # that is decoded together has few others in between.
        slots = (free if program.adapter_spec is None else free[::-1])[: len(jobs)]
        self._engine.prefill([job.row for job in jobs], slots, program)
        return slots

    async def _decode(self) -> None:
        """A few tokens more for every slot, after those that nobody waits for have been freed."""
        self._slots = {slot: job for slot, job in self._slots.items() if not job.future.done()}
        if not self._slots:
            return
        rows = {slot: job.row for slot, job in self._slots.items()}
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            output: DecodeOutput = await self.call(self._engine.decode, rows)
        except Exception as error:
            _log.exception("a decoding step has failed")
            self._metrics.failures.inc()
            await self._empty_slots(error)
            return
        self._metrics.batch_seconds.labels("decode").observe(loop.time() - began)
        generated = 0
        for slot, job in list(self._slots.items()):
            number = int(output.position_M[slot])
            ids = output.ids_MS[slot][:number].tolist()
            if job.on_ids is not None and not job.future.done():
                job.on_ids(ids)
            if output.done_M[slot]:
                _answer(job, GeneratedRow(ids=ids, log_prob=float(output.score_M[slot])))
                generated += number
                del self._slots[slot]
        self._metrics.tokens.inc(generated)

    async def _compute(
        self,
        jobs: list[Job],
        compute: Callable[[list[Job]], list[T]],
        keep: Callable[[Job, T], None],
    ) -> None:
        """Calls ``keep`` with each job and its result.

        If a batch fails, each owner's jobs are retried alone.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            results = await self.call(compute, jobs)
        except Exception as error:
            self._metrics.failures.inc()
            await self.repair(error)
            owners = list(dict.fromkeys(job.owner for job in jobs))
            if len(owners) == 1:
                _log.exception("a batch of %d rows has failed", len(jobs))
                for job in jobs:
                    _fail(job, error)
                return
            for owner in owners:
                pending = [job for job in jobs if job.owner == owner and not job.future.done()]
                if pending:
                    await self._compute(pending, compute, keep)
            return
        seconds = loop.time() - began
        self._metrics.batch(jobs[0].kind, len(jobs), seconds)
        self._metrics.waited(began - job.since for job in jobs)
        self._seconds_per_row += 0.1 * (seconds / len(jobs) - self._seconds_per_row)
        for job, result in zip(jobs, results, strict=True):
            keep(job, result)

    async def repair(self, error: Exception) -> None:
        """Replaces what may have been donated to a failed program."""
        # Asked between two programs: each takes the slots that it changes away while it runs.
        if await self.call(lambda: self._engine.has_lost_slots):
            await self._empty_slots(error)
        else:
            await self.call(self._engine.cache.clear)

    async def _empty_slots(self, error: Exception) -> None:
        """Restarts every row that was being decoded, each alone; one that was alone fails."""
        lost, self._slots = self._slots, {}
        await self.call(self._engine.reset)
        for job in lost.values():
            if job.alone:
                _fail(job, error)
            elif not job.future.done():
                job.alone = True
                job.apart = object()
                job.group = self._group_of(job)
                self._groups[job.group] = deque([job])

    def _group_of(self, job: Job) -> Hashable:
        program = self._engine.program_for(job.kind, [job.row], 1)
        key = self._engine.batch_key(job.row)
        return job.kind, program.length, program.targets, key, job.apart

    def drop_gone(self) -> None:
        """Removes jobs from the queue that nobody waits for any more."""
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
