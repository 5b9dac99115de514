"""Who shares a batch, who waits, who is dropped; with an engine that only counts."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from prompt_tuning_jax.serving.decode_state import DecodeOutput
from prompt_tuning_jax.serving.engine import Engine
from prompt_tuning_jax.serving.metrics import Metrics
from prompt_tuning_jax.serving.scheduler import (
    GeneratedRow,
    Job,
    QueueFullError,
    Scheduler,
    WorkerFailedError,
)
from prompt_tuning_jax.serving.shapes import Row
from tests.serving.serving_micro import SHAPES, micro_model


class Counting(Engine):
    """Scores with the sum of a row's ids, writes them back; waits for ``gate`` before a batch."""

    def __init__(self) -> None:
        super().__init__(micro_model(), shapes=SHAPES, cache_rows=6)
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.begun = 0
        self.poison = -1
        self.loses_slots = False  # when the prefill of a poisoned row fails
        self.poison_decoding: set[int] = set()
        self.decoded_together: list[list[int]] = []
        self.rows: dict[int, tuple[Row, int]] = {}
        self.seconds = {program: 1.0 for program in SHAPES.programs()}
        self._made.update(dict.fromkeys(self.compiler._steps))

    def score(self, rows: Any, program: Any) -> Any:
        self._begin(rows)
        return [[float(sum(row.ids))] for row in rows]

    def prefill(self, rows: Any, slots: Any, program: Any) -> None:
        states = dict(self._states)
        if self.loses_slots:
            self._states.clear()
        self._begin(rows)
        self._states.update(states)
        assert not {*slots} & {*self.rows}
        self.rows.update({slot: (row, 0) for slot, row in zip(slots, rows, strict=True)})

    def decode(self, rows: Any) -> DecodeOutput:
        assert {*rows} <= {*self.rows}, "a slot without a row is decoded"
        self.rows = {slot: self.rows[slot] for slot in rows}
        self.decoded_together.append(sorted(row.ids[0] for row in rows.values()))
        if any(row.ids[0] in self.poison_decoding for row in rows.values()):
            raise RuntimeError("decoding failed")
        ids, scores = np.zeros((8, 6), int), np.zeros(8)
        positions, done = np.zeros(8, int), np.ones(8, bool)
        for slot, (row, before) in list(self.rows.items()):
            number = min(before + 1, row.limit)
            ids[slot, : row.limit] = row.ids[0]
            positions[slot], done[slot] = number, number == row.limit
            self.rows[slot] = row, number
            if number == row.limit:
                del self.rows[slot]
        return DecodeOutput(ids, positions, scores, done)  # type: ignore[arg-type]

    def reset(self) -> None:
        self.rows = {}
        self._states = dict(self._abstract_states)

    def _begin(self, rows: Any) -> None:
        self.begun += 1
        self.gate.wait(10)
        self.batches.append([row.ids[0] for row in rows])
        if any(self.poison in row.ids for row in rows):
            raise RuntimeError("the device said no")


def job(*ids: int, kind: Any = "score", owner: object = None, **options: Any) -> Job:
    row = Row(ids=ids, targets=((1,),), limit=options.pop("limit", 2))
    future = asyncio.get_running_loop().create_future()
    return Job(kind=kind, row=row, future=future, owner=owner or object(), **options)


async def until_begun(engine: Counting) -> None:
    """Until the first batch is at the gate."""
    while not engine.begun:
        await asyncio.sleep(0.005)


def with_scheduler(
    test: Callable[[Scheduler, Counting], Coroutine[Any, Any, None]], **options: Any
) -> None:
    async def run() -> None:
        engine = Counting()
        scheduler = Scheduler(engine, Metrics(), **options)
        scheduler.start()
        async with asyncio.timeout(20):
            await test(scheduler, engine)
            engine.gate.set()
            await scheduler.close()
        assert not scheduler.alive

    asyncio.run(run())


def test_rows_of_many_requests_share_batches_by_length() -> None:
    async def test(scheduler: Scheduler, engine: Counting) -> None:
        short = [job(n, 1) for n in range(2, 7)]
        long = [job(*[n] * 9) for n in range(20, 23)]
        scheduler.submit([short[0], long[0]])
        scheduler.submit([*short[1:], *long[1:]])
        values = [(await one.future)[0] for one in (*short, *long)]
        assert values == [3, 4, 5, 6, 7, 180, 189, 198]
        assert sorted(engine.batches) == [[2, 3, 4, 5], [6], [20, 21, 22]]

    with_scheduler(test)


def test_jobs_that_are_to_stay_apart_do() -> None:
    async def test(scheduler: Scheduler, engine: Counting) -> None:
        jobs = [job(n, 1, apart=n % 2) for n in range(2, 6)]
        scheduler.submit(jobs)
        await asyncio.gather(*(one.future for one in jobs))
        assert sorted(engine.batches) == [[2, 4], [3, 5]]

    with_scheduler(test)


def test_rows_that_are_to_stay_apart_are_not_decoded_together() -> None:
    async def test(scheduler: Scheduler, engine: Counting) -> None:
        jobs = [job(n, 1, kind="generate", limit=4, apart=n % 2) for n in range(2, 6)]
        scheduler.submit(jobs)
        score = job(9, 1)
        scheduler.submit([score])
        await asyncio.gather(*(one.future for one in (*jobs, score)))
        assert {len({n % 2 for n in row}) for row in engine.decoded_together if row} == {1}
        assert engine.decoded_together[0] == [2, 4]

    with_scheduler(test)


def test_an_idle_device_waits_a_little_for_others() -> None:
    async def test(scheduler: Scheduler, engine: Counting) -> None:
        first, second = job(2, 1), job(3, 1)
        scheduler.submit([first])
        await asyncio.sleep(0.05)
        assert not engine.batches
        scheduler.submit([second])
        await asyncio.gather(first.future, second.future)
        assert engine.batches == [[2, 3]]

    with_scheduler(test, max_wait=0.3)


def test_a_full_batch_does_not_wait() -> None:
    async def test(scheduler: Scheduler, engine: Counting) -> None:
        jobs = [job(n, 1) for n in range(2, 6)]
        scheduler.submit(jobs)
        await asyncio.gather(*(one.future for one in jobs))

    with_scheduler(test, max_wait=1000)


def test_a_full_queue_takes_all_of_a_request_or_nothing() -> None:
    async def test(scheduler: Scheduler, engine: Counting) -> None:
        engine.gate.clear()
        busy = job(2, 1)
        scheduler.submit([busy])
        await until_begun(engine)
        waiting = [job(n, 1) for n in range(3, 6)]
        scheduler.submit(waiting)
        with pytest.raises(QueueFullError) as refused:
            scheduler.submit([job(8, 1), job(9, 1)])
        assert refused.value.seconds > 0
        assert scheduler.waiting == 3
        waiting[0].future.cancel()  # makes room
        scheduler.submit([job(8, 1), job(9, 1)])
        assert scheduler.waiting == 4

    with_scheduler(test, max_queue=4)


def test_rows_nobody_waits_for_are_not_computed() -> None:
    async def test(scheduler: Scheduler, engine: Counting) -> None:
        engine.gate.clear()
        scheduler.submit([job(2, 1)])
        await until_begun(engine)
        jobs = [job(n, 1) for n in range(3, 7)]
        scheduler.submit(jobs)
        for one in jobs[1:]:
            one.future.cancel()
        engine.gate.set()
        assert await jobs[0].future == [4.0]
        assert engine.batches == [[2], [3]]

    with_scheduler(test)


def test_a_failure_fails_its_request_alone() -> None:
    async def test(scheduler: Scheduler, engine: Counting) -> None:
        engine.poison = 66
        owner = object()
        good, bad, also_bad = job(2, 1), job(66, 1, owner=owner), job(3, 1, owner=owner)
        other = job(4, 1)
        scheduler.submit([good, bad, also_bad, other])
        assert await good.future == [3.0]
        assert await other.future == [5.0]
        for one in (bad, also_bad):
            with pytest.raises(WorkerFailedError):
                await one.future

    with_scheduler(test)


@pytest.mark.parametrize(("poison", "loses_slots"), [(-1, False), (66, False), (66, True)])
def test_writing_is_continuous(poison: int, loses_slots: bool) -> None:
    """Nine rows in four slots; one that fails to enter takes nobody with it."""

    async def test(scheduler: Scheduler, engine: Counting) -> None:
        engine.poison, engine.loses_slots = poison, loses_slots
        jobs = [job(n, 1, kind="generate", limit=1 + n % 5) for n in range(2, 11)]
        bad = job(66, 1, kind="generate")
        scheduler.submit([*jobs[:2], bad, *jobs[2:]])
        for one in jobs:
            number = 1 + one.row.ids[0] % 5
            found = await one.future
            assert found == GeneratedRow(ids=[one.row.ids[0]] * number, log_prob=0.0)
        if poison == 66:
            with pytest.raises(WorkerFailedError):
                await bad.future
        else:
            await bad.future
        # Somebody has entered while others were being written.
        assert len(engine.batches) > 3

    with_scheduler(test)


def test_short_and_long_rows_have_slots_of_their_own() -> None:
    """A short row waits for a short slot beside free long ones, and keeps no long row waiting."""

    async def test(scheduler: Scheduler, engine: Counting) -> None:
        short = [job(n, 1, kind="generate", limit=4) for n in range(2, 7)]
        long = [job(*[n] * 9, kind="generate", limit=4) for n in range(20, 22)]
        scheduler.submit([*short, *long])
        await asyncio.gather(*(one.future for one in (*short, *long)))
        assert max(engine.decoded_together, key=len) == [2, 3, 4, 5, 20, 21]
        assert engine.decoded_together[-1] == [6]

    with_scheduler(test)


def test_text_is_followed_and_given_up() -> None:
    async def test(scheduler: Scheduler, engine: Counting) -> None:
        seen: list[list[int]] = []
        left = job(3, 1, kind="generate", limit=6)

        def follow(ids: list[int]) -> None:
            seen.append(ids)
            if len(ids) == 2:
                left.future.cancel()

        left.on_ids = follow
        stays = job(2, 1, kind="generate", limit=6)
        scheduler.submit([left, stays])
        assert len((await stays.future).ids) == 6
        assert seen == [[3], [3, 3]]
        assert not engine.rows

    with_scheduler(test)


def test_a_step_of_writing_that_fails_fails_the_row_that_made_it_fail() -> None:
    async def test(scheduler: Scheduler, engine: Counting) -> None:
        engine.poison_decoding = {3}
        pieces: list[list[int]] = []
        jobs = [job(n, 1, kind="generate") for n in (2, 4)]
        jobs.append(job(3, 1, kind="generate", on_ids=pieces.append))
        scheduler.submit(jobs)
        later = [job(n, 1, kind="generate") for n in (5, 6)]
        with pytest.raises(WorkerFailedError):
            await jobs[2].future
        scheduler.submit(later)
        for one in (*jobs[:2], *later):
            assert (await one.future).ids == [one.row.ids[0]] * 2
        assert engine.decoded_together[0] == [2, 3, 4]
        again = [together for together in engine.decoded_together[1:] if {*together} & {2, 3, 4}]
        assert all(len(together) == 1 for together in again)
        assert engine.decoded_together.count([3]) == 1
        assert not pieces

    with_scheduler(test)


def test_a_repair_beside_a_running_program_takes_no_slots_away() -> None:
    """A program has slots in hand while it runs, which are not lost."""

    async def test(scheduler: Scheduler, engine: Counting) -> None:
        engine.loses_slots = True
        engine.gate.clear()
        one = job(2, 1, kind="generate")
        scheduler.submit([one])
        await until_begun(engine)
        repair = asyncio.create_task(scheduler.repair(RuntimeError("another program failed")))
        await asyncio.sleep(0.01)
        engine.gate.set()
        assert (await one.future).ids == [2, 2]
        await repair
        assert engine.decoded_together == [[2], [2]] and engine.begun == 1

    with_scheduler(test)


def test_the_end_answers_what_waits() -> None:
    async def test(scheduler: Scheduler, engine: Counting) -> None:
        engine.gate.clear()
        jobs = [job(n, 1) for n in range(2, 12)]
        jobs += [job(n, 1, kind="generate") for n in range(12, 18)]
        scheduler.submit(jobs)
        closing = asyncio.create_task(scheduler.close())
        await asyncio.sleep(0.01)
        engine.gate.set()
        await closing
        assert all(one.future.done() for one in jobs)

    with_scheduler(test)
