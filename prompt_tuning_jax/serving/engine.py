"""The model on the device and its compiled programs; no network, no waiting, one thread."""

import os
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.data.vocabularies.vocab import AnyVocabulary
from prompt_tuning_jax.distributed.sharding import Partitioner, spans_devices
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.serving.compiling import Compiler, Step
from prompt_tuning_jax.serving.decode_state import DecodeOutput, idle_output, init_decode_state
from prompt_tuning_jax.serving.programs import Batch, Programs, held_prompts
from prompt_tuning_jax.serving.prompt_cache import (
    Cache,
    PromptCache,
    abstract,
    adapter_caches,
    device_put,
)
from prompt_tuning_jax.serving.shapes import (
    DecodeProgram,
    HoldProgram,
    Kind,
    Program,
    Row,
    Shapes,
    SlotPool,
    decode_options,
    target_array,
    token_array,
)
from prompt_tuning_jax.serving.tasks import AdapterSpec, Served, ServedMethod, ServedPrompt
from prompt_tuning_jax.typing import HostArray

NEAREST = 5  # words of each prompt position
_LONG_ENOUGH = 0.2  # seconds that need not be measured again
_RUNS = 4  # by which a shorter time is measured
_STEPS = 4  # tokens that are decoded before any row may join or leave


class Engine:
    """Scores and generates for rows of any mix of prompts, methods, lengths and targets.

    One batch of ``score`` or ``prefill`` holds rows of equal ``batch_key``; rows of all keys are
    decoded side by side.  ``compile`` or ``compile_first`` comes first.  All calls belong to one
    thread at a time, except those that say what to compile.
    """

    def __init__(
        self,
        model: Model,
        *,
        shapes: Shapes,
        cache_rows: int = 256,
        partitioner: Partitioner | None = None,
        methods: Sequence[ServedMethod] = (),
    ) -> None:
        """``cache_rows`` prompts, and as many methods of each spec, are on the device at once."""
        if model.vocabulary is None:
            raise UserError("this model has no vocabulary, which a server needs to read text")
        self.shapes = shapes
        self.vocabulary: AnyVocabulary = model.vocabulary
        self.config, self.dtype = model.config, jnp.dtype(model.dtype)
        self.causal = model.causal
        self._partitioner = partitioner
        graphdef, params = param_tree.split(model)
        self._model = model  # for the shapes of what it reads
        self._params = params if partitioner is None else partitioner.replicate_arrays(params)
        self.cache = PromptCache(
            rows=cache_rows,
            length=shapes.prompt_lengths[-1],
            width=model.config.embed_dim,
            dtype=self.dtype,
            copy_sizes=shapes.batch_sizes,
            hold=partial(held_prompts, graphdef),
            params=self._params,
            compiled=lambda program: self._made.get(program),
            at_end=not model.causal,
            partitioner=partitioner,
        )
        adapters = adapter_caches(
            methods, shapes=shapes, max_methods=cache_rows, partitioner=partitioner
        )
        # By spec, None being that of plain prompts.
        self._caches: dict[AdapterSpec | None, Cache] = {None: self.cache}
        for spec, adapter_cache in adapters.items():
            self._caches[spec] = adapter_cache
        self._examples = {method.adapter_spec: method for method in methods}  # to be timed with
        self._programs = {
            spec: Programs(
                graphdef if spec is None else spec.graphdef,
                token_ids=model.config.token_ids,
                adapter_spec=spec,
                gathered=cache.gathered,
                partitioner=partitioner,
            )
            for spec, cache in self._caches.items()
        }
        self.seconds: dict[Program, float] = {}  # of each program that can be used
        self._runs: dict[Program, list[float]] = {}  # by which that is measured
        self._rough: set[Program] = set()  # to be measured better than that
        self._unusable: set[Program] = set()  # they failed while they were measured
        self._widths: dict[int, int] = {}  # encoder positions of the row in each slot
        # Without those that were donated to a program that then failed.
        self._states: dict[SlotPool, Any] = self._init_states()
        self._abstract_states = {
            pool: abstract(state, partitioner) for pool, state in self._states.items()
        }
        self.compiler = Compiler(list(self._steps()))
        self._made = self.compiler.made

    def programs(self) -> Iterator[Program]:
        """Returns every program that reads inputs."""
        # A model without classes answers nothing by itself.
        bare = not self.config.reads_images or self.config.vocab_size > 0
        specs = [spec for spec in self._caches if spec is not None or bare]
        return chain.from_iterable(self.shapes.programs(spec) for spec in specs)

    def compile(self, report: Callable[[str], None] = lambda name: None) -> None:
        """Compiles and measures every program; ``report`` is called with the name of each."""
        self.compiler.start(later=os.cpu_count() or 1)
        self.compiler.wait_for_all(report)
        while self.measure():
            pass
        self.reset()

    def compile_first(self, report: Callable[[str], None] = lambda name: None) -> None:
        """Compiles what every request can be answered with.

        The rest is compiled in other threads, and used once ``measure`` has run it.
        """
        self.compiler.start()
        self.compiler.wait_for_first(report)
        for program in self._unmeasured():
            self.seconds[program] = self._seconds_of(program)  # too long, being the first run
            self._rough.add(program)
        self.reset()

    def measure(self) -> bool:
        """Times one compiled program that is not measured yet; returns whether there was one.

        Slots that are being decoded are not touched.  From then on the program is used, unless it
        fails: then its error is raised once.
        """
        for program in self._unmeasured():
            runs = self._runs.setdefault(program, [])
            try:
                runs.append(self._seconds_of(program))
            except Exception:  # such as too little memory; other programs do its work
                self._unusable.add(program)
                raise
            # The first run is slow: its memory has never been touched.
            if len(runs) == _RUNS or (len(runs) > 1 and min(runs) > _LONG_ENOUGH):
                self.seconds[program] = min(self._runs.pop(program))
                self._rough.discard(program)
            return True
        return False

    def batch_key(self, row: Row) -> Hashable:
        """Returns a key, equal for rows of similar length that one program can compute together."""
        spec = row.adapter_spec
        if row.prompt is None or self._caches[spec].gathered:
            return spec
        return spec, row.prompt.number

    def can_decode(self, rows: Sequence[Row]) -> bool:
        """Returns whether the device can hold all trained arrays that decoding these rows needs."""
        wanted: dict[AdapterSpec, set[int]] = {}
        for row in rows:
            if row.prompt is not None and row.adapter_spec is not None:
                wanted.setdefault(row.adapter_spec, set()).add(row.prompt.number)
        return all(len(numbers) <= self._caches[spec].capacity for spec, numbers in wanted.items())

    def rows_at_once(self, program: Program, waiting: int) -> int:
        """Returns the batch size that answers most rows per second if this many are waiting.

        Only compiled programs count; the compiler remembers which one would be best.
        """
        sizes = self.shapes.batch_sizes
        ideal = next((size for size in sizes if size >= waiting), sizes[-1])
        self.compiler.want(replace(program, rows=ideal))

        def rate(rows: int) -> float:
            usable = self._usable(replace(program, rows=rows))
            return min(rows, waiting) / self.seconds[usable] if usable else 0.0

        return max(sizes, key=rate)

    def slots_for(self, program: Program) -> range:
        """Returns the slots that are filled now with rows of this program."""
        return self.shapes.pool_of(self._with_decodable_slots(program).length).slots

    def usable(self, kind: Kind, rows: Sequence[Row]) -> Program:
        """Returns the fastest compiled program for these rows.

        There are at most as many rows as ``rows_at_once`` said.
        """
        size = next(size for size in self.shapes.batch_sizes if size >= len(rows))
        program = self.program_for(kind, rows, size)
        usable = self._usable(program)
        if usable is None:
            raise RuntimeError(f"no program is compiled for {size} x {program.length} tokens")
        return usable

    def _usable(self, program: Program) -> Program | None:
        """Returns the program itself or, until it is compiled, the fastest that can replace it."""
        if program not in self.seconds:
            self.compiler.want(program)
        program = self._with_decodable_slots(program)
        if program in self.seconds:
            return program
        # A copy: the thread that measures may add to it meanwhile.
        others = [one for one in [*self.seconds] if one.can_replace(program)]
        if program.kind == "generate":
            slots = self.shapes.pool_of(program.length)
            others = [one for one in others if self.shapes.pool_of(one.length) == slots]
        return min(others, key=self.seconds.__getitem__, default=None)

    def _with_decodable_slots(self, program: Program) -> Program:
        """Returns the program, or one for long slots as long as its own cannot be decoded."""
        *shorter, longest = self.shapes.pools
        pool = self.shapes.pool_of(program.length)
        if program.kind == "score" or pool not in shorter:
            return program
        reads, decodes = self._largest(pool, program.adapter_spec)
        if reads in self.seconds and decodes in self._made:
            return program
        for key in (reads, decodes):
            self.compiler.want(key)
        return replace(program, length=longest.lengths[0])

    def _largest(self, pool: SlotPool, spec: AdapterSpec | None) -> tuple[Program, DecodeProgram]:
        """Returns the two programs that can generate whatever fits into these slots, row by row."""
        *_, width = self.shapes.widths(pool, spec)
        length = pool.lengths[-1]
        shape: Any = {"length": length, "prompt_length": width - length, "adapter_spec": spec}
        reads = Program(kind="generate", rows=self.shapes.batch_sizes[0], **shape)
        slots = len(pool.slots)
        return reads, DecodeProgram(pool=pool, slots=slots, width=width, adapter_spec=spec)

    def program_for(self, kind: Kind, rows: Sequence[Row], size: int) -> Program:
        """Returns the smallest program of ``size`` rows for these rows of equal ``batch_key``."""
        spec = rows[0].adapter_spec
        length = self.shapes.length_for(max(len(row.ids) for row in rows))
        prompt_length: int | None
        if spec is not None:
            prompt_length = spec.prompt_positions
        else:
            lengths = [row.prompt.length or 0 for row in rows if row.prompt is not None]
            prompt_length = self.shapes.prompt_length_for(max(lengths, default=0))
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
            adapter_spec=spec,
        )

    def score(self, rows: Sequence[Row], program: Program) -> list[list[float]]:
        """Returns the summed log-probability of each target of each row."""
        arrays, batch = self._batch(rows, program)
        made, targets = self._made[program], self._targets(rows, program)
        scores_BC = np.asarray(made(self._params, arrays, batch, targets))
        return [
            scores_C[: len(row.targets)].tolist()
            for row, scores_C in zip(rows, scores_BC, strict=False)
        ]

    def prefill(self, rows: Sequence[Row], slots: Sequence[int], program: Program) -> None:
        """Encodes rows into free ``slots_for`` this program, from which ``decode`` continues."""
        pool = self.shapes.pool_of(program.length)
        slot_B = np.full(program.rows, len(pool.slots), np.int32)
        slot_B[: len(slots)] = [pool.slots.index(slot) for slot in slots]
        arrays, batch = self._batch(rows, program)
        where = (self._put(slot_B, ("batch",)), self._options(rows, program))
        made = self._made[program]
        state = self._states.pop(pool)  # donated, even if the program fails
        self._states[pool] = made(self._params, arrays, state, batch, *where)
        self._widths.update(dict.fromkeys(slots, program.width))

    def decode(self, rows: Mapping[int, Row]) -> DecodeOutput:
        """Decodes a few more tokens of these rows, by slot; rows of other slots stay as they are.

        Rows of one ``batch_key`` in slots of one width share a program.
        """
        pools = self.shapes.pools
        outputs = {pool: idle_output(self.shapes, pool) for pool in pools}
        for pool in pools:
            groups: dict[Hashable, dict[int, Row]] = {}
            for slot in sorted({*rows} & {*pool.slots}):
                groups.setdefault(self.batch_key(rows[slot]), {})[slot] = rows[slot]
            for group in groups.values():
                outputs[pool] = self._decode_group(pool, group)
        return DecodeOutput(*map(np.concatenate, zip(*outputs.values(), strict=True)))

    def _decode_group(self, pool: SlotPool, rows: Mapping[int, Row]) -> DecodeOutput:
        spec = next(iter(rows.values())).adapter_spec
        numbers = [pool.slots.index(slot) for slot in rows]
        first, last = min(numbers), max(numbers)
        number = next(one for one in self._slot_numbers(pool) if one > last - first)
        width = max(self._widths[slot] for slot in rows)
        width = next(one for one in self.shapes.widths(pool, spec) if one >= width)
        program = self._usable_decode(
            DecodeProgram(pool=pool, slots=number, width=width, adapter_spec=spec)
        )
        row_M = np.zeros(len(pool.slots), np.int32)
        active_M = np.zeros(len(pool.slots), bool)
        active_M[numbers] = True
        arrays: Any = None
        if spec is not None:
            arrays, row_M[numbers] = self._caches[spec].take([row.prompt for row in rows.values()])
        first = min(first, len(pool.slots) - program.slots)
        where = self._where(row_M, active_M, first)
        state = self._states.pop(pool)
        self._states[pool], output = self._made[program](self._params, arrays, state, *where)
        return output

    def nearest_words(self, prompt: ServedPrompt) -> tuple[HostArray, HostArray]:
        """Ids and cosines ``[P, 5]`` of the embeddings most similar to each of its positions."""
        padded_PD = np.zeros((self.shapes.prompt_lengths[-1], self.config.embed_dim), self.dtype)
        length = len(prompt.prompt_PD)
        padded_PD[:length] = prompt.prompt_PD
        ids, cosines = self._made["nearest"](self._params, self._put(padded_PD, (None, None)))
        return np.asarray(ids)[:length], np.asarray(cosines)[:length]

    @property
    def has_lost_slots(self) -> bool:
        """Whether a program has failed half-way and taken the rows of slots with it."""
        return len(self._states) < len(self._abstract_states)

    def reset(self) -> None:
        """Empties slots and caches: at the start, and after a program has failed half-way."""
        self._states = self._init_states()
        for cache in self._caches.values():
            cache.clear()

    def _steps(self) -> Iterator[Step]:
        """Returns all programs in the order in which they are compiled.

        The first ones can answer everything.
        """
        shapes = self.shapes
        longest = shapes.prompt_lengths[-1]
        *shorter, long = shapes.pools
        second = set[Hashable]({"nearest"})  # the page asks for it at once
        for pool, spec in product(shorter, self._caches):
            second.update(self._largest(pool, spec))  # until then these slots cannot be used

        def rank(key: Hashable, *, is_first: bool) -> int:
            return 0 if is_first else 1 if key in second else 2

        ordered: list[tuple[tuple[Any, ...], Step]] = []
        for program in self.programs():
            # The longest with the fewest rows: whatever comes fits into it, one by one.
            is_first = (
                program.rows == shapes.batch_sizes[0]
                and program.width == (shapes.widths(long, program.adapter_spec)[-1])
            )
            step = Step(
                key=program,
                name=f"{program.kind} {program.rows} x {program.length} tokens"
                + self._of_method(program.adapter_spec),
                make=partial(self._compile, program),
                first=is_first,
            )
            priority = rank(program, is_first=is_first), program.length, program.rows
            ordered.append((priority, step))
        for spec in filter(shapes.generates, self._caches):
            for decode in self._decode_programs(spec):
                number, width = decode.slots, decode.width
                is_first = decode == self._largest(long, spec)[1]
                step = Step(
                    key=decode,
                    name=f"decode {number} x {width} positions" + self._of_method(spec),
                    make=partial(self._compile_decode, decode),
                    first=is_first,
                )
                priority = rank(decode, is_first=is_first), max(1, width - longest), number
                ordered.append((priority, step))
        for number in shapes.batch_sizes:
            hold = HoldProgram(prompts=number)
            step = Step(
                key=hold,
                name=f"{number} prompts",
                make=partial(self.cache.compile, hold),
                first=number == shapes.batch_sizes[0],
            )
            ordered.append(((rank(hold, is_first=step.first), 0, number), step))
        nearest = Step(key="nearest", name="nearest words", make=self._compile_nearest, first=False)
        if not self.config.reads_images:
            ordered.append(((rank("nearest", is_first=False), 0, 0), nearest))
        return (step for _, step in sorted(ordered, key=lambda one: one[0]))

    def _of_method(self, spec: AdapterSpec | None) -> str:
        return "" if spec is None else f" of {self._examples[spec].method}"

    def _compile(self, program: Program) -> Any:
        programs, cache = self._programs[program.adapter_spec], self._caches[program.adapter_spec]
        tokens = self._tokens([], program)
        numbers = self._put(np.zeros(program.rows, np.int32), ("batch",))
        batch = Batch(tokens_BT=tokens, row_B=numbers, prompt_length_B=numbers, placement_B=numbers)
        arrays = cache.abstract()
        if program.targets is not None:
            function = jax.jit(partial(programs.score, prompt_length=program.prompt_length))
            targets = self._targets([], program)
            return _compiled(function, self._params, arrays, batch, targets)
        prefill = partial(programs.prefill, prompt_length=program.prompt_length)
        pool = self.shapes.pool_of(program.length)
        function = jax.jit(prefill, donate_argnums=2, **self._state_shardings(pool))
        options, state = self._options([], program), self._abstract_states[pool]
        return _compiled(function, self._params, arrays, state, batch, numbers, options)

    def _compile_decode(self, program: DecodeProgram) -> Any:
        spec = program.adapter_spec
        arrays = None if spec is None else self._caches[spec].abstract()
        slots = len(program.pool.slots)
        where = self._where(np.zeros(slots, np.int32), np.zeros(slots, bool), 0)
        decode = partial(
            self._programs[spec].decode, slots=program.slots, width=program.width, steps=_STEPS
        )
        out = self._state_shardings(program.pool)
        if self._partitioner is not None and out:
            out = {"out_shardings": (out["out_shardings"], self._partitioner.replicated)}
        function = jax.jit(decode, donate_argnums=2, **out)
        state = self._abstract_states[program.pool]
        return _compiled(function, self._params, arrays, state, *where)

    def _compile_nearest(self) -> Any:
        positions = (self.shapes.prompt_lengths[-1], self.config.embed_dim)
        prompt_PD = self._put(np.zeros(positions, self.dtype), (None, None))
        function = jax.jit(partial(self._programs[None].nearest_words, number=NEAREST))
        return _compiled(function, self._params, prompt_PD)

    def _state_shardings(self, pool: SlotPool) -> dict[str, Any]:
        """Returns the shardings of a state, which must leave a call as it entered it."""
        if not spans_devices(self._partitioner):
            return {}
        state = self._abstract_states[pool]
        return {"out_shardings": jax.tree.map(lambda one: one.sharding, state)}

    def _usable_decode(self, program: DecodeProgram) -> DecodeProgram:
        """Returns the program itself or, until it is compiled, the smallest that can replace it."""
        if program in self._made:
            return program
        self.compiler.want(program)
        others = self._decode_programs(program.adapter_spec)
        larger = [one for one in others if one.can_replace(program) and one in self._made]
        return min(larger, key=lambda one: one.slots * one.width)

    def _decode_programs(self, spec: AdapterSpec | None) -> Iterator[DecodeProgram]:
        for pool in self.shapes.pools:
            for slots, width in product(self._slot_numbers(pool), self.shapes.widths(pool, spec)):
                yield DecodeProgram(pool=pool, slots=slots, width=width, adapter_spec=spec)

    def _unmeasured(self) -> Iterator[Program]:
        return (
            program
            for program in self.programs()
            if program in self._made
            and program not in self._unusable
            and (program not in self.seconds or program in self._rough)
        )

    def _slot_numbers(self, pool: SlotPool) -> tuple[int, ...]:
        """Returns how many adjacent slots can be decoded.

        A mesh shards them, so that only all can be.
        """
        slots = len(pool.slots)
        if spans_devices(self._partitioner):
            return (slots,)
        return (*(size for size in self.shapes.batch_sizes if size < slots), slots)

    def _seconds_of(self, program: Program) -> float:
        eos = self.config.token_ids.eos
        prompt: Served | None = None
        if program.adapter_spec is not None:
            prompt = self._examples[program.adapter_spec]
        ids: Any = (eos,) * program.length
        if self.config.reads_images:
            ids = np.zeros(program.length, np.uint8)
        row = Row(ids=ids, prompt=prompt, targets=((eos,),), limit=1)
        began = time.perf_counter()
        if program.kind == "score":
            self.score([row], program)
        else:
            self.prefill([row], [], program)  # into no slot
            jax.block_until_ready(self._states[self.shapes.pool_of(program.length)].done_M)
        return time.perf_counter() - began

    def _batch(self, rows: Sequence[Row], program: Program) -> tuple[Any, Batch]:
        """Returns the cache's arrays with all prompts of these rows, and the rows on the device."""
        columns = np.zeros((3, program.rows), np.int32)
        cache = self._caches[program.adapter_spec]
        arrays, columns[0, : len(rows)] = cache.take([row.prompt for row in rows])
        for number, row in enumerate(rows):
            if isinstance(row.prompt, ServedPrompt):
                columns[1:, number] = len(row.prompt.prompt_PD), row.prompt.placement
        row_B, prompt_length_B, placement_B = (self._put(one, ("batch",)) for one in columns)
        return arrays, Batch(
            tokens_BT=self._tokens(rows, program),
            row_B=row_B,
            prompt_length_B=prompt_length_B,
            placement_B=placement_B,
        )

    def _tokens(self, rows: Sequence[Row], program: Program) -> Any:
        ids, images = self.config.token_ids, self.config.reads_images
        return self._put(token_array(rows, program, ids, images=images), ("batch", "length"))

    def _targets(self, rows: Sequence[Row], program: Program) -> Any:
        targets_BCS = target_array(rows, program, self.config.token_ids)
        return self._put(targets_BCS, ("batch", None, None))

    def _options(self, rows: Sequence[Row], program: Program) -> Any:
        options = decode_options(rows, program, max_new_tokens=self.shapes.max_new_tokens)
        return jax.tree.map(lambda array_B: self._put(array_B, ("batch",)), options)

    def _where(self, row_M: HostArray, active_M: HostArray, first: int) -> tuple[Any, Any, Any]:
        slots = self._put(row_M, (None,)), self._put(active_M, (None,))
        return *slots, self._put(np.asarray(first, np.int32), ())

    def _init_states(self) -> dict[SlotPool, Any]:
        shapes, states = self.shapes, dict[SlotPool, Any]()
        for pool in shapes.pools if "generate" in shapes.modes else ():
            width = max(shapes.widths(pool, spec)[-1] for spec in self._caches)
            states[pool] = init_decode_state(
                shapes, pool, self._model, width=width, partitioner=self._partitioner
            )
        return states

    def _put(self, array: HostArray, axes: tuple[str | None, ...]) -> Any:
        return device_put(array, axes, self._partitioner)


def _compiled(function: Any, *arguments: Any) -> Any:
    return function.lower(*arguments).compile()
