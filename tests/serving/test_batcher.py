"""Who shares a batch, who waits, who is dropped; with an engine that only counts."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from prompt_tuning_jax.serving.batcher import (
    Batcher,
    Job,
    QueueFullError,
    WorkerFailedError,
    WrittenRow,
)
from prompt_tuning_jax.serving.decode_state import Written
from prompt_tuning_jax.serving.engine import Engine
from prompt_tuning_jax.serving.metrics import Metrics
from prompt_tuning_jax.serving.rows import Row
from tests.serving.serving_micro import SHAPES, micro_model


class Counting(Engine):
    """Scores with the sum of a row's ids, writes them back; waits for ``gate`` before a batch."""

    def __init__(self) -> None:
        super().__init__(micro_model(), shapes=SHAPES, cache_rows=6)
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.poison = -1
        self.poison_writing: set[int] = set()
        self.written_together: list[list[int]] = []
        self.rows: dict[int, tuple[Row, int]] = {}
        self.seconds = {program: 1.0 for program in SHAPES.programs()}

    def score(self, rows: Any, program: Any) -> Any:
        self._begin(rows)
        return [[float(sum(row.ids))] for row in rows]

    def prefill(self, rows: Any, slots: Any, program: Any) -> None:
        self._begin(rows)
        assert not {*slots} & {*self.rows}
        self.rows.update({slot: (row, 0) for slot, row in zip(slots, rows, strict=True)})

    def write(self, *, slots: int, width: int, given_up: Any = ()) -> Written:
        for slot in given_up:
            self.rows.pop(slot)
        assert all(slot < slots for slot in self.rows)
        self.written_together.append(sorted(row.ids[0] for row, _ in self.rows.values()))
        if any(row.ids[0] in self.poison_writing for row, _ in self.rows.values()):
            raise RuntimeError("writing failed")
        seen: Any = [[[]] * 4, [0] * 4, [0.0] * 4, [True] * 4]
        import numpy as np

        ids = np.zeros((4, 6), int)
        for slot, (row, done) in list(self.rows.items()):
            number = min(done + 1, row.limit)
            ids[slot, : row.limit] = row.ids[0]
            seen[1][slot], seen[3][slot] = number, number == row.limit
            self.rows[slot] = row, number
            if number == row.limit:
                del self.rows[slot]
        return Written(ids, *map(np.asarray, seen[1:]))  # type: ignore[arg-type]

    def reset(self) -> None:
        self.rows = {}

    def _begin(self, rows: Any) -> None:
        self.gate.wait(10)
        self.batches.append([row.ids[0] for row in rows])
        if any(self.poison in row.ids for row in rows):
            raise RuntimeError("the device said no")


def job(*ids: int, kind: Any = "score", owner: object = None, **options: Any) -> Job:
    row = Row(ids=ids, targets=((1,),), limit=options.pop("limit", 2))
    future = asyncio.get_running_loop().create_future()
    return Job(kind=kind, row=row, future=future, owner=owner or object(), **options)


def with_batcher(
    test: Callable[[Batcher, Counting], Coroutine[Any, Any, None]], **options: Any
) -> None:
    async def run() -> None:
        engine = Counting()
        batcher = Batcher(engine, Metrics(), **options)
        batcher.start()
        async with asyncio.timeout(20):
            await test(batcher, engine)
            engine.gate.set()
            await batcher.close()
        assert not batcher.alive

    asyncio.run(run())


def test_rows_of_many_requests_share_batches_by_length() -> None:
    async def test(batcher: Batcher, engine: Counting) -> None:
        short = [job(n, 1) for n in range(2, 7)]
        long = [job(*[n] * 9) for n in range(20, 23)]
        batcher.submit([short[0], long[0]])
        batcher.submit([*short[1:], *long[1:]])
        values = [(await one.future)[0] for one in (*short, *long)]
        assert values == [3, 4, 5, 6, 7, 180, 189, 198]
        assert sorted(engine.batches) == [[2, 3, 4, 5], [6], [20, 21, 22]]

    with_batcher(test)


def test_jobs_that_are_to_stay_apart_do() -> None:
    async def test(batcher: Batcher, engine: Counting) -> None:
        jobs = [job(n, 1, apart=n % 2) for n in range(2, 6)]
        batcher.submit(jobs)
        await asyncio.gather(*(one.future for one in jobs))
        assert sorted(engine.batches) == [[2, 4], [3, 5]]

    with_batcher(test)


def test_rows_that_are_to_stay_apart_are_not_written_together() -> None:
    async def test(batcher: Batcher, engine: Counting) -> None:
        jobs = [job(n, 1, kind="generate", limit=4, apart=n % 2) for n in range(2, 6)]
        batcher.submit(jobs)
        score = job(9, 1)
        batcher.submit([score])
        await asyncio.gather(*(one.future for one in (*jobs, score)))
        assert {len({n % 2 for n in row}) for row in engine.written_together if row} == {1}
        assert engine.written_together[0] == [2, 4]

    with_batcher(test)


def test_an_idle_device_waits_a_little_for_others() -> None:
    async def test(batcher: Batcher, engine: Counting) -> None:
        first, second = job(2, 1), job(3, 1)
        batcher.submit([first])
        await asyncio.sleep(0.05)
        assert not engine.batches
        batcher.submit([second])
        await asyncio.gather(first.future, second.future)
        assert engine.batches == [[2, 3]]

    with_batcher(test, max_wait=0.3)


def test_a_full_batch_does_not_wait() -> None:
    async def test(batcher: Batcher, engine: Counting) -> None:
        jobs = [job(n, 1) for n in range(2, 6)]
        batcher.submit(jobs)
        await asyncio.gather(*(one.future for one in jobs))

    with_batcher(test, max_wait=1000)


def test_a_full_queue_takes_all_of_a_request_or_nothing() -> None:
    async def test(batcher: Batcher, engine: Counting) -> None:
        engine.gate.clear()
        busy = job(2, 1)
        batcher.submit([busy])
        await asyncio.sleep(0.02)
        waiting = [job(n, 1) for n in range(3, 6)]
        batcher.submit(waiting)
        with pytest.raises(QueueFullError) as refused:
            batcher.submit([job(8, 1), job(9, 1)])
        assert refused.value.seconds > 0
        assert batcher.waiting == 3
        waiting[0].future.cancel()  # makes room
        batcher.submit([job(8, 1), job(9, 1)])
        assert batcher.waiting == 4

    with_batcher(test, max_queue=4)


def test_rows_nobody_waits_for_are_not_computed() -> None:
    async def test(batcher: Batcher, engine: Counting) -> None:
        engine.gate.clear()
        batcher.submit([job(2, 1)])
        await asyncio.sleep(0.02)
        jobs = [job(n, 1) for n in range(3, 7)]
        batcher.submit(jobs)
        for one in jobs[1:]:
            one.future.cancel()
        engine.gate.set()
        assert await jobs[0].future == [4.0]
        assert engine.batches == [[2], [3]]

    with_batcher(test)


def test_a_failure_fails_its_request_alone() -> None:
    async def test(batcher: Batcher, engine: Counting) -> None:
        engine.poison = 66
        owner = object()
        good, bad, also_bad = job(2, 1), job(66, 1, owner=owner), job(3, 1, owner=owner)
        other = job(4, 1)
        batcher.submit([good, bad, also_bad, other])
        assert await good.future == [3.0]
        assert await other.future == [5.0]
        for one in (bad, also_bad):
            with pytest.raises(WorkerFailedError):
                await one.future

    with_batcher(test)


@pytest.mark.parametrize("poison", [-1, 66])
def test_writing_is_continuous(poison: int) -> None:
    """Nine rows in four slots; one that fails to enter takes nobody with it."""

    async def test(batcher: Batcher, engine: Counting) -> None:
        engine.poison = poison
        jobs = [job(n, 1, kind="generate", limit=1 + n % 5) for n in range(2, 11)]
        bad = job(66, 1, kind="generate")
        batcher.submit([*jobs[:2], bad, *jobs[2:]])
        for one in jobs:
            number = 1 + one.row.ids[0] % 5
            found = await one.future
            assert found == WrittenRow(ids=[one.row.ids[0]] * number, log_prob=0.0)
        if poison == 66:
            with pytest.raises(WorkerFailedError):
                await bad.future
        else:
            await bad.future
        # Somebody has entered while others were being written.
        assert len(engine.batches) > 3

    with_batcher(test)


def test_text_is_followed_and_given_up() -> None:
    async def test(batcher: Batcher, engine: Counting) -> None:
        seen: list[list[int]] = []
        left = job(3, 1, kind="generate", limit=6)

        def follow(ids: list[int]) -> None:
            seen.append(ids)
            if len(ids) == 2:
                left.future.cancel()

        left.on_ids = follow
        stays = job(2, 1, kind="generate", limit=6)
        batcher.submit([left, stays])
        assert len((await stays.future).ids) == 6
        assert seen == [[3], [3, 3]]
        assert not engine.rows

    with_batcher(test)


def test_a_step_of_writing_that_fails_fails_the_row_that_made_it_fail() -> None:
    async def test(batcher: Batcher, engine: Counting) -> None:
        engine.poison_writing = {3}
        pieces: list[list[int]] = []
        jobs = [job(n, 1, kind="generate") for n in (2, 4)]
        jobs.append(job(3, 1, kind="generate", on_ids=pieces.append))
        batcher.submit(jobs)
        later = [job(n, 1, kind="generate") for n in (5, 6)]
        with pytest.raises(WorkerFailedError):
            await jobs[2].future
        batcher.submit(later)
        for one in (*jobs[:2], *later):
            assert (await one.future).ids == [one.row.ids[0]] * 2
        assert engine.written_together[0] == [2, 3, 4]
        again = [together for together in engine.written_together[1:] if {*together} & {2, 3, 4}]
        assert all(len(together) == 1 for together in again)
        assert engine.written_together.count([3]) == 1
        assert not pieces

    with_batcher(test)


def test_the_end_answers_what_waits() -> None:
    async def test(batcher: Batcher, engine: Counting) -> None:
        engine.gate.clear()
        jobs = [job(n, 1) for n in range(2, 12)]
        jobs += [job(n, 1, kind="generate") for n in range(12, 18)]
        batcher.submit(jobs)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0.01)
        engine.gate.set()
        await closing
        assert all(one.future.done() for one in jobs)

    with_batcher(test)
