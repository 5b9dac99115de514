"""The model on the device and its compiled programs; no network, no waiting, one thread."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax import tree
from prompt_tuning_jax.data.vocab import AnyVocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.layout import Layout
from prompt_tuning_jax.models.t5 import T5
from prompt_tuning_jax.serving.device_cache import DeviceCache
from prompt_tuning_jax.serving.methods import Methods
from prompt_tuning_jax.serving.placing import placed
from prompt_tuning_jax.serving.programs import Programs, Rows
from prompt_tuning_jax.serving.rows import Row, limit_array, target_array, token_array
from prompt_tuning_jax.serving.shapes import Kind, Program, Shapes
from prompt_tuning_jax.serving.structures import ServedMethod
from prompt_tuning_jax.serving.table import Written, empty_table
from prompt_tuning_jax.serving.tasks import ServedPrompt
from prompt_tuning_jax.typing import HostArray

NEAREST = 5  # words of each prompt position
_LONG_ENOUGH = 0.2  # seconds that need not be measured again
_STEPS = 4  # tokens that are written before anybody may enter or leave
_TIMED_STEPS = 16  # tokens of a text, where a whole batch is timed


class Engine:
    """Scores and writes for rows of any mix of prompts, lengths and targets, or of one structure.

    ``compile`` comes first.  All calls are for one thread at a time.
    """

    def __init__(
        self,
        model: T5,
        *,
        shapes: Shapes,
        cache_rows: int = 256,
        layout: Layout | None = None,
        methods: Sequence[ServedMethod] = (),
    ) -> None:
        """``cache_rows`` prompts and as many methods are on the device at once."""
        if model.vocabulary is None:
            raise UserError("this model came without a vocabulary, and a server takes texts")
        self.shapes = shapes
        self.vocabulary: AnyVocabulary = model.vocabulary
        self.config, self.dtype = model.config, jnp.dtype(model.dtype)
        self._layout = layout
        graphdef, params = tree.split(model)
        self._programs = Programs(graphdef, layout)
        self._params = params if layout is None else layout.place_whole(params)
        self.cache = DeviceCache(
            rows=cache_rows,
            length=shapes.prompt_lengths[-1],
            width=model.config.embed_dim,
            dtype=self.dtype,
            copy_sizes=shapes.batch_sizes,
            layout=layout,
        )
        self.methods = Methods(methods, shapes=shapes, most=cache_rows, layout=layout)
        self._made: dict[Any, Any] = {}
        self.seconds: dict[Program, float] = {}  # of each program, measured once
        self.table: Any = self._empty_table()

    def programs(self) -> Iterator[Program]:
        """Everything that reads inputs."""
        return chain(self.shapes.programs(), self.methods.programs())

    def steps_to_compile(self) -> int:
        """How many times ``compile`` reports."""
        return len(list(self._to_compile()))

    def compile(self, report: Callable[[str], None] = lambda name: None) -> None:
        """Makes every program and runs it; ``report`` is called with the name of each."""
        threads = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="compile")
        jobs = [(key, name, threads.submit(make)) for key, name, make in self._to_compile()]
        try:
            for key, name, job in jobs:
                self._made[key] = job.result()
                report(name)
        finally:
            threads.shutdown(cancel_futures=True)
        for program in self.programs():
            self.seconds[program] = self._seconds_of(program)
        self.reset()

    def rows_at_once(self, program: Program, waiting: int) -> int:
        """Of the batch sizes, the one that answers most rows a second when so many wait."""

        def rate(rows: int) -> float:
            return min(rows, waiting) / self.seconds[with_rows(program, rows)]

        return max(self.shapes.batch_sizes, key=rate)

    def program_for(self, kind: Kind, rows: Sequence[Row], size: int) -> Program:
        """The smallest that holds these rows, with ``size`` rows."""
        length = self.shapes.length_for(max(len(row.ids) for row in rows))
        lengths = [0 if row.prompt is None else len(row.prompt.prompt_PD) for row in rows]
        structure = None if rows[0].method is None else rows[0].method.structure
        prompt_length = 0 if structure else self.shapes.prompt_length_for(max(lengths))
        targets = None
        if kind == "score":
            longest = max(len(ids) for row in rows for ids in row.targets)
            targets = self.shapes.targets_for(max(len(row.targets) for row in rows), longest)
        if length is None or prompt_length is None or (kind == "score" and targets is None):
            raise UserError("a row is longer than every shape that this server has compiled")
        return Program(
            kind=kind,
            length=length,
            rows=size,
            prompt_length=prompt_length,
            targets=targets,
            structure=structure,
        )

    def score(self, rows: Sequence[Row], program: Program) -> list[list[float]]:
        """The summed log-probability of each target of each row."""
        targets = self._place(target_array(rows, program), ("batch", None, None))
        if program.structure is None:
            placed_rows = self._placed_rows(rows, program)  # copies prompts to the device
            given: Any = self.cache.prompts_NPD, placed_rows
        else:
            given = self.methods.tuned_of(rows, program), self._placed_tokens(rows, program)
        scores_BC = np.asarray(self._made[program](self._params, *given, targets))
        return [
            scores_C[: len(row.targets)].tolist()
            for row, scores_C in zip(rows, scores_BC, strict=False)
        ]

    def write_whole(self, rows: Sequence[Row], program: Program) -> list[tuple[list[int], float]]:
        """The ids that each row writes to its end or limit, and their log-probability."""
        given = self._placed_tokens(rows, program), self._placed_limits(rows, program)
        tuned = self.methods.tuned_of(rows, program)
        made = self._made[program](self._params, tuned, *given)
        ids_BS, scores_B, lengths_B = map(np.asarray, made)
        return [
            (ids_BS[row, : lengths_B[row]].tolist(), float(scores_B[row]))
            for row in range(len(rows))
        ]

    def admit(self, rows: Sequence[Row], slots: Sequence[int], program: Program) -> None:
        """Reads rows into free slots, from where ``write`` goes on."""
        slot_B = np.full(program.rows, self.shapes.slots, np.int32)
        slot_B[: len(slots)] = slots
        read = self._placed_rows(rows, program)
        where = (self._place(slot_B, ("batch",)), self._placed_limits(rows, program))
        made = self._made[program]
        table, self.table = self.table, None  # given away, even where it fails
        self.table = made(self._params, self.cache.prompts_NPD, table, read, *where)

    def write(self, *, slots: int, width: int, given_up: Sequence[int] = ()) -> Written:
        """A few tokens more in the first ``slots``; ``width`` is the widest of the rows in them.

        Slots behind them must be done, or ``given_up``.
        """
        given_up_M = np.zeros(self.shapes.slots, bool)
        given_up_M[list(given_up)] = True
        used = next(one for one in self._slots_used() if one >= slots)
        width = next(one for one in self.shapes.widths() if one >= width)
        table, self.table = self.table, None
        made = self._made[used, width]
        self.table, seen = made(self._params, table, self._place(given_up_M, (None,)))
        return jax.tree.map(np.asarray, seen)

    def nearest_words(self, prompt: ServedPrompt) -> tuple[HostArray, HostArray]:
        """Ids and cosines ``[P, 5]`` of the embeddings most like each of its positions."""
        padded_PD = np.zeros((self.shapes.prompt_lengths[-1], self.config.embed_dim), self.dtype)
        own = len(prompt.prompt_PD)
        padded_PD[:own] = prompt.prompt_PD
        ids, cosines = self._made["nearest"](self._params, self._place(padded_PD, (None, None)))
        return np.asarray(ids)[:own], np.asarray(cosines)[:own]

    def reset(self) -> None:
        """Empties slots and cache: at the start, and where a program has failed half-way."""
        self.table = self._empty_table()
        self.cache.clear()

    def _to_compile(self) -> Iterator[tuple[Any, str, Callable[[], Any]]]:
        shapes, programs = self.shapes, self._programs
        table, prompts_NPD = self.table, self.cache.prompts_NPD
        # A table comes out as it goes in, or it would not fit the next call.
        out: dict[str, Any] = {}
        out_written: dict[str, Any] = {}
        if self._layout is not None and not self._layout.is_trivial:
            lies = jax.tree.map(lambda x: x.sharding, table)
            out = {"out_shardings": lies}
            out_written = {"out_shardings": (lies, self._layout.replicated)}
        for program in self.methods.programs():
            tokens = self._placed_tokens([], program)
            if program.targets is not None:
                rest = self._place(target_array([], program), ("batch", None, None))
            else:
                rest = self._placed_limits([], program)
            function, tuned = self.methods.function(program), self.methods.like(program)
            name = self.methods.name_of(program)
            yield program, name, partial(_compiled, function, self._params, tuned, tokens, rest)
        for program in shapes.programs():
            rows = self._placed_rows([], program)
            about = f"{program.rows} x {program.length} tokens"
            if program.targets is not None:
                targets = self._place(target_array([], program), ("batch", None, None))
                last: tuple[Any, ...] = (rows, targets)
                function = jax.jit(partial(programs.score, prompt_length=program.prompt_length))
                first: tuple[Any, ...] = (self._params, prompts_NPD)
            else:
                admit = partial(programs.admit, prompt_length=program.prompt_length)
                slots = self._place(np.zeros(program.rows, np.int32), ("batch",))
                last = (table, rows, slots, slots)
                function = jax.jit(admit, donate_argnums=2, **out)
                first = (self._params, prompts_NPD)
            yield program, f"{program.kind} {about}", partial(_compiled, function, *first, *last)
        if "generate" in shapes.kinds:
            nobody = self._place(np.zeros(shapes.slots, bool), (None,))
            for slots, width in product(self._slots_used(), shapes.widths()):
                written = partial(programs.write, slots=slots, width=width, steps=_STEPS)
                function = jax.jit(written, donate_argnums=1, **out_written)
                make = partial(_compiled, function, self._params, table, nobody)
                yield (slots, width), f"write {slots} beside {width} positions", make
        positions = (shapes.prompt_lengths[-1], self.config.embed_dim)
        prompt_PD = self._place(np.zeros(positions, self.dtype), (None, None))
        function = jax.jit(partial(programs.nearest_words, number=NEAREST))
        yield "nearest", "nearest words", partial(_compiled, function, self._params, prompt_PD)

    def _slots_used(self) -> tuple[int, ...]:
        """How many slots, from the first, can be written to: all on a mesh, which shares them."""
        slots = self.shapes.slots
        if self._layout is not None and not self._layout.is_trivial:
            return (slots,)
        return (*(size for size in self.shapes.batch_sizes if size < slots), slots)

    def _seconds_of(self, program: Program) -> float:
        row = Row(
            ids=(1,) * program.length,
            method=self.methods.one_of(program.structure),
            targets=((1,),),
            limit=_TIMED_STEPS if program.kind == "write" else 1,
        )
        best = float("inf")
        # The first call is slow: its memory has never been touched.
        for number in range(4):
            began = time.perf_counter()
            if program.kind == "score":
                self.score([row], program)
            elif program.kind == "write":
                self.write_whole([row], program)
            else:
                self.admit([row], [0], program)
                jax.block_until_ready(self.table.done_M)
            best = min(best, time.perf_counter() - began)
            if number and best > _LONG_ENOUGH:
                break
        return best

    def _placed_rows(self, rows: Sequence[Row], program: Program) -> Rows:
        own = np.zeros((3, program.rows), np.int32)
        prompts = [row.prompt for row in rows]
        own[0, : len(rows)] = self.cache.rows_of(prompts)
        for number, prompt in enumerate(prompts):
            if prompt is not None:
                own[1:, number] = len(prompt.prompt_PD), prompt.placement
        return Rows(
            tokens_BT=self._placed_tokens(rows, program),
            prompt_B=self._place(own[0], ("batch",)),
            prompt_length_B=self._place(own[1], ("batch",)),
            placement_B=self._place(own[2], ("batch",)),
        )

    def _placed_tokens(self, rows: Sequence[Row], program: Program) -> Any:
        return self._place(token_array(rows, program), ("batch", "length"))

    def _placed_limits(self, rows: Sequence[Row], program: Program) -> Any:
        most = self.shapes.max_new_tokens
        return self._place(limit_array(rows, program, most=most), ("batch",))

    def _empty_table(self) -> Any:
        return empty_table(self.shapes, self.config, dtype=self.dtype, layout=self._layout)

    def _place(self, array: HostArray, axes: tuple[str | None, ...]) -> Any:
        return placed(array, axes, self._layout)


def with_rows(program: Program, rows: int) -> Program:
    """The same program for another number of rows."""
    return Program(**{**vars(program), "rows": rows})


def _compiled(function: Any, *arguments: Any) -> Any:
    return function.lower(*arguments).compile()
