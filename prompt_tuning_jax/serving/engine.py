"""The model on the device and its compiled programs; no network, no waiting, one thread."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.data.vocabularies.vocab import AnyVocabulary
from prompt_tuning_jax.distributed.sharding import Partitioner
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.t5.model import T5
from prompt_tuning_jax.serving.adapter_spec import ServedMethod
from prompt_tuning_jax.serving.compiling import Compiler, Step
from prompt_tuning_jax.serving.decode_state import Written, init_decode_state
from prompt_tuning_jax.serving.device_cache import DeviceCache
from prompt_tuning_jax.serving.methods import Methods
from prompt_tuning_jax.serving.programs import Programs, Rows
from prompt_tuning_jax.serving.prompt_position import device_put
from prompt_tuning_jax.serving.rows import Row, target_array, token_array, write_options
from prompt_tuning_jax.serving.shapes import Kind, Program, Shapes
from prompt_tuning_jax.serving.tasks import ServedPrompt
from prompt_tuning_jax.typing import HostArray

NEAREST = 5  # words of each prompt position
_LONG_ENOUGH = 0.2  # seconds that need not be measured again
_RUNS = 4  # by which a shorter time is measured
_STEPS = 4  # tokens that are written before anybody may enter or leave
_TIMED_STEPS = 16  # tokens of a text, where a whole batch is timed


class Engine:
    """Scores and writes for rows of any mix of prompts, lengths and targets, or of one structure.

    ``compile`` or ``compile_first`` comes first.  All calls are for one thread at a time, but for
    those that say what to compile.
    """

    def __init__(
        self,
        model: T5,
        *,
        shapes: Shapes,
        cache_rows: int = 256,
        partitioner: Partitioner | None = None,
        methods: Sequence[ServedMethod] = (),
    ) -> None:
        """``cache_rows`` prompts and as many methods are on the device at once."""
        if model.vocabulary is None:
            raise UserError("this model came without a vocabulary, and a server takes texts")
        self.shapes = shapes
        self.vocabulary: AnyVocabulary = model.vocabulary
        self.config, self.dtype = model.config, jnp.dtype(model.dtype)
        self._layout = partitioner
        graphdef, params = param_tree.split(model)
        self._programs = Programs(graphdef, partitioner)
        self._params = params if partitioner is None else partitioner.replicate_arrays(params)
        self.cache = DeviceCache(
            rows=cache_rows,
            length=shapes.prompt_lengths[-1],
            width=model.config.embed_dim,
            dtype=self.dtype,
            copy_sizes=shapes.batch_sizes,
            partitioner=partitioner,
        )
        self.methods = Methods(methods, shapes=shapes, most=cache_rows, partitioner=partitioner)
        self.seconds: dict[Program, float] = {}  # of each program that can be used
        self._runs: dict[Program, list[float]] = {}  # by which that is measured
        self._rough: set[Program] = set()  # to be measured better than that
        self.table: Any = self._empty_table()
        self._table_like = self._like(self.table)
        self.compiler = Compiler(list(self._steps()))
        self._made = self.compiler.made

    def programs(self) -> Iterator[Program]:
        """Everything that reads inputs."""
        return chain(self.shapes.programs(), self.methods.programs())

    def compile(self, report: Callable[[str], None] = lambda name: None) -> None:
        """Makes every program and measures it; ``report`` is called with the name of each."""
        self.compiler.start(later=os.cpu_count() or 1)
        self.compiler.wait_for_all(report)
        while self.measure():
            pass
        self.reset()

    def compile_first(self, report: Callable[[str], None] = lambda name: None) -> None:
        """Makes what every request can be answered with.

        The rest is made in threads of its own, and used once ``measure`` has run it.
        """
        self.compiler.start()
        self.compiler.wait_for_first(report)
        for program in self._unmeasured():
            self.seconds[program] = self._seconds_of(program)  # too long, being the first run
            self._rough.add(program)
        self.reset()

    def measure(self) -> bool:
        """Runs a program that is made once, if one is not measured yet, to know its time.

        Nothing of what is being written is touched.  From then on the program is used.
        """
        for program in self._unmeasured():
            runs = self._runs.setdefault(program, [])
            runs.append(self._seconds_of(program))
            # The first run is slow: its memory has never been touched.
            if len(runs) == _RUNS or (len(runs) > 1 and min(runs) > _LONG_ENOUGH):
                self.seconds[program] = min(self._runs.pop(program))
                self._rough.discard(program)
            return True
        return False

    def rows_at_once(self, program: Program, waiting: int) -> int:
        """Of the batch sizes, the one that answers most rows a second when so many wait.

        Of programs that are made; which one would be best is remembered by the compiler.
        """
        sizes = self.shapes.batch_sizes
        ideal = next((size for size in sizes if size >= waiting), sizes[-1])
        self.compiler.want(with_rows(program, ideal))

        def rate(rows: int) -> float:
            usable = self._usable(with_rows(program, rows))
            return min(rows, waiting) / self.seconds[usable] if usable else 0.0

        return max(sizes, key=rate)

    def usable(self, kind: Kind, rows: Sequence[Row]) -> Program:
        """The quickest for these rows that is made; no more of them than ``rows_at_once`` said."""
        size = next(size for size in self.shapes.batch_sizes if size >= len(rows))
        program = self.program_for(kind, rows, size)
        usable = self._usable(program)
        if usable is None:
            raise RuntimeError(f"no program is made for {size} rows of {program.length} tokens")
        return usable

    def _usable(self, program: Program) -> Program | None:
        """The program itself, or while it is not made the quickest that does the same."""
        if program in self.seconds:
            return program
        self.compiler.want(program)
        # A copy: the thread that measures may add to it meanwhile.
        others = [one for one in [*self.seconds] if one.does_work_of(program)]
        return min(others, key=self.seconds.__getitem__, default=None)

    def program_for(self, kind: Kind, rows: Sequence[Row], size: int) -> Program:
        """The smallest that holds these rows, with ``size`` rows."""
        length = self.shapes.length_for(max(len(row.ids) for row in rows))
        lengths = [0 if row.prompt is None else len(row.prompt.prompt_PD) for row in rows]
        adapter_spec = None if rows[0].method is None else rows[0].method.adapter_spec
        prompt_length = 0 if adapter_spec else self.shapes.prompt_length_for(max(lengths))
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
            adapter_spec=adapter_spec,
        )

    def score(self, rows: Sequence[Row], program: Program) -> list[list[float]]:
        """The summed log-probability of each target of each row."""
        targets = self._placed_targets(rows, program)
        if program.adapter_spec is None:
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
        given = self._placed_tokens(rows, program), self._placed_options(rows, program)
        trainable = self.methods.tuned_of(rows, program)
        made = self._made[program](self._params, trainable, *given)
        ids_BS, scores_B, lengths_B = map(np.asarray, made)
        return [
            (ids_BS[row, : lengths_B[row]].tolist(), float(scores_B[row]))
            for row in range(len(rows))
        ]

    def prefill(self, rows: Sequence[Row], slots: Sequence[int], program: Program) -> None:
        """Reads rows into free slots, from where ``write`` goes on."""
        slot_B = np.full(program.rows, self.shapes.slots, np.int32)
        slot_B[: len(slots)] = slots
        read = self._placed_rows(rows, program)
        where = (self._place(slot_B, ("batch",)), self._placed_options(rows, program))
        made = self._made[program]
        table, self.table = self.table, None  # given away, even where it fails
        self.table = made(self._params, self.cache.prompts_NPD, table, read, *where)

    def write(self, *, slots: int, width: int, given_up: Sequence[int] = ()) -> Written:
        """A few tokens more in the first ``slots``; ``width`` is the widest of the rows in them.

        Injections behind them must be done, or ``given_up``.
        """
        given_up_M = np.zeros(self.shapes.slots, bool)
        given_up_M[list(given_up)] = True
        used = next(one for one in self._slots_used() if one >= slots)
        width = next(one for one in self.shapes.widths() if one >= width)
        made = self._made.get((used, width))
        if made is None:
            self.compiler.want((used, width))
            made = self._larger_write(used, width)
        table, self.table = self.table, None
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

    def _steps(self) -> Iterator[Step]:
        """All programs, in the order in which they are made; the first answer everything."""
        shapes = self.shapes
        every = [*self.programs()]
        first = {program for program in every if self._is_first(program)}
        longest = shapes.prompt_lengths[-1]
        ordered: list[tuple[tuple[Any, ...], Step]] = []
        for program in every:
            order = (program not in first, program.length, program.rows)
            step = Step(
                key=program,
                name=self._name_of(program),
                make=partial(self._compile, program),
                first=program in first,
            )
            ordered.append((order, step))
        if "generate" in shapes.kinds:
            widest = self._slots_used()[-1], shapes.widths()[-1]
            for slots, width in product(self._slots_used(), shapes.widths()):
                is_first = (slots, width) == widest
                step = Step(
                    key=(slots, width),
                    name=f"write {slots} beside {width} positions",
                    make=partial(self._compile_write, slots, width),
                    first=is_first,
                )
                ordered.append(((not is_first, max(1, width - longest), slots), step))
        nearest = Step(key="nearest", name="nearest words", make=self._compile_nearest, first=False)
        ordered.append(((True, 0, 0), nearest))  # the page asks for it at once
        return (step for _, step in sorted(ordered, key=lambda one: one[0]))

    def _is_first(self, program: Program) -> bool:
        """The longest with the fewest rows: whatever comes fits into it, one by one."""
        shapes = self.shapes
        longest_prompt = program.adapter_spec is not None or (
            program.prompt_length == shapes.prompt_lengths[-1]
        )
        alone = program.rows == shapes.batch_sizes[0]
        return program.length == shapes.longest and alone and longest_prompt

    def _name_of(self, program: Program) -> str:
        if program.adapter_spec is not None:
            return self.methods.name_of(program)
        return f"{program.kind} {program.rows} x {program.length} tokens"

    def _compile(self, program: Program) -> Any:
        programs = self._programs
        if program.targets is not None:
            last = (self._placed_targets([], program),)
        else:
            last = (self._placed_options([], program),)
        tokens = self._placed_tokens([], program)
        if program.adapter_spec is not None:
            function, trainable = self.methods.function(program), self.methods.like(program)
            return _compiled(function, self._params, trainable, tokens, *last)
        numbers = self._place(np.zeros(program.rows, np.int32), ("batch",))
        rows = Rows(
            tokens_BT=tokens, prompt_B=numbers, prompt_length_B=numbers, placement_B=numbers
        )
        prompts_NPD = self._like(self.cache.prompts_NPD)
        if program.targets is not None:
            function = jax.jit(partial(programs.score, prompt_length=program.prompt_length))
            return _compiled(function, self._params, prompts_NPD, rows, *last)
        prefill = partial(programs.prefill, prompt_length=program.prompt_length)
        function = jax.jit(prefill, donate_argnums=2, **self._out_table())
        return _compiled(
            function, self._params, prompts_NPD, self._table_like, rows, numbers, *last
        )

    def _compile_write(self, slots: int, width: int) -> Any:
        nobody = self._place(np.zeros(self.shapes.slots, bool), (None,))
        written = partial(self._programs.write, slots=slots, width=width, steps=_STEPS)
        out = self._out_table()
        if self._layout is not None and out:
            out = {"out_shardings": (out["out_shardings"], self._layout.replicated)}
        function = jax.jit(written, donate_argnums=1, **out)
        return _compiled(function, self._params, self._table_like, nobody)

    def _compile_nearest(self) -> Any:
        positions = (self.shapes.prompt_lengths[-1], self.config.embed_dim)
        prompt_PD = self._place(np.zeros(positions, self.dtype), (None, None))
        function = jax.jit(partial(self._programs.nearest_words, number=NEAREST))
        return _compiled(function, self._params, prompt_PD)

    def _out_table(self) -> dict[str, Any]:
        """A table comes out as it goes in, or it would not fit the next call."""
        if self._layout is None or self._layout.is_single_device:
            return {}
        return {"out_shardings": jax.tree.map(lambda one: one.sharding, self._table_like)}

    def _like(self, arrays: Any) -> Any:
        """What is compiled for, in place of arrays that a program may take meanwhile."""
        on_mesh = self._layout is not None and not self._layout.is_single_device

        def like(one: Any) -> Any:
            sharding = one.sharding if on_mesh else None
            return jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=sharding)

        return jax.tree.map(like, arrays)

    def _larger_write(self, slots: int, width: int) -> Any:
        """Of the made ones the smallest that does the same; one does everything."""
        pairs = product(self._slots_used(), self.shapes.widths())
        validator = [(s, w) for s, w in pairs if s >= slots and w >= width and (s, w) in self._made]
        return self._made[min(validator, key=lambda one: one[0] * one[1])]

    def _unmeasured(self) -> Iterator[Program]:
        return (
            program
            for program in self.programs()
            if program in self._made and (program not in self.seconds or program in self._rough)
        )

    def _slots_used(self) -> tuple[int, ...]:
        """How many slots, from the first, can be written to: all on a mesh, which shares them."""
        slots = self.shapes.slots
        if self._layout is not None and not self._layout.is_single_device:
            return (slots,)
        return (*(size for size in self.shapes.batch_sizes if size < slots), slots)

    def _seconds_of(self, program: Program) -> float:
        row = Row(
            ids=(self.config.token_ids.eos,) * program.length,
            method=self.methods.one_of(program.adapter_spec),
            targets=((self.config.token_ids.eos,),),
            limit=_TIMED_STEPS if program.kind == "write" else 1,
        )
        began = time.perf_counter()
        if program.kind == "score":
            self.score([row], program)
        elif program.kind == "write":
            self.write_whole([row], program)
        else:
            self.prefill([row], [self.shapes.slots], program)  # into no slot
            jax.block_until_ready(self.table.done_M)
        return time.perf_counter() - began

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
        return self._place(token_array(rows, program, self.config.token_ids), ("batch", "length"))

    def _placed_targets(self, rows: Sequence[Row], program: Program) -> Any:
        targets_BCS = target_array(rows, program, self.config.token_ids)
        return self._place(targets_BCS, ("batch", None, None))

    def _placed_options(self, rows: Sequence[Row], program: Program) -> Any:
        most = self.shapes.max_new_tokens
        options = write_options(rows, program, most=most)
        return jax.tree.map(lambda array_B: self._place(array_B, ("batch",)), options)

    def _empty_table(self) -> Any:
        return init_decode_state(
            self.shapes, self.config, dtype=self.dtype, partitioner=self._layout
        )

    def _place(self, array: HostArray, axes: tuple[str | None, ...]) -> Any:
        return device_put(array, axes, self._layout)


def with_rows(program: Program, rows: int) -> Program:
    """The same program for another number of rows."""
    return Program(**{**vars(program), "rows": rows})


def _compiled(function: Any, *arguments: Any) -> Any:
    return function.lower(*arguments).compile()
