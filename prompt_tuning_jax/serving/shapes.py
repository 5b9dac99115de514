"""The few shapes that a server computes in, and batches of rows padded to them.

A program is compiled for a length of inputs, a number of rows, a length of prompts and, to score
targets, their number and length.  Every request is padded into a compiled program or split into
several rows, so no request waits for compilation.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from typing import Any, Literal, TypeAlias

import jax
import numpy as np

from prompt_tuning_jax.config.serving import Mode
from prompt_tuning_jax.data.batching.buckets import Buckets
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.decoding.logits_processors import LogitsProcessors
from prompt_tuning_jax.models.config import TokenIds
from prompt_tuning_jax.serving.tasks import AdapterSpec, Served
from prompt_tuning_jax.typing import HostArray

# Of "generate" a program prefills slots; the slots are then decoded continuously.
Kind: TypeAlias = Literal["score", "generate"]
# Larger label sets are scored in several rows, longer labels one by one.
_MAX_LABELS, _MAX_LABEL_LENGTH = 16, 8
_PROMPT_LENGTHS = 2


@dataclass(frozen=True, kw_only=True)
class Targets:
    """C target strings of S tokens each for every input."""

    number: int
    length: int

    def holds(self, number: int, length: int) -> bool:
        return number <= self.number and length <= self.length


@dataclass(frozen=True, kw_only=True)
class Program:
    """One compiled function that reads inputs: T, B, P, and the targets that it scores, if any.

    Without an ``adapter_spec`` it is for plain prompts; with one, for the methods of that spec,
    and P is the number of positions that they add to the encoder's input.
    """

    kind: Kind
    length: int
    rows: int
    prompt_length: int
    targets: Targets | None = None
    adapter_spec: AdapterSpec | None = None

    @property
    def width(self) -> int:
        """The number of encoder positions U."""
        return self.prompt_length + self.length

    def can_replace(self, other: "Program") -> bool:
        """Returns whether whatever fits ``other`` fits this program, with the same result."""
        same = (self.kind, self.targets, self.adapter_spec)
        return same == (other.kind, other.targets, other.adapter_spec) and (
            self.length >= other.length
            and self.rows >= other.rows
            and self.prompt_length >= other.prompt_length
        )


@dataclass(frozen=True, kw_only=True)
class SlotPool:
    """The numbers of the slots of one width, and the lengths of the inputs that are read into them.

    A slot has room for the last of these lengths.
    """

    slots: range
    lengths: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class DecodeProgram:
    """One compiled function that decodes: adjacent slots of a pool, and encoder positions U."""

    pool: SlotPool
    slots: int
    width: int
    adapter_spec: AdapterSpec | None = None

    def can_replace(self, other: "DecodeProgram") -> bool:
        """Returns whether it decodes what ``other`` does."""
        same = self.adapter_spec is other.adapter_spec and self.pool == other.pool
        return same and self.slots >= other.slots and self.width >= other.width


@dataclass(frozen=True, kw_only=True)
class HoldProgram:
    """One compiled function that puts prompts on the device: at most so many at once."""

    prompts: int


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """The shapes of one server.

    ``lengths`` of inputs in tokens, the end of sequence included, ``batch_sizes`` in rows and
    ``prompt_lengths`` in positions (at least 1) are sorted; ``targets`` start with the smallest.
    ``max_new_tokens`` limits each generated text.  ``slots`` rows with inputs of the shorter half
    of ``lengths`` and ``long_slots`` rows with longer ones are decoded at once.  ``modes`` are the
    kinds of requests that there are programs for.
    """

    lengths: tuple[int, ...] = (32, 64, 128, 256, 512)
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    prompt_lengths: tuple[int, ...] = (100,)
    targets: tuple[Targets, ...] = (Targets(number=4, length=4), Targets(number=1, length=64))
    max_new_tokens: int = 64
    slots: int = 16
    long_slots: int = 8
    modes: tuple[Mode, ...] = ("label", "generate", "score")

    def __post_init__(self) -> None:
        if not self.modes:
            raise UserError("modes is empty; give one or several of label, generate and score")
        for name in ("lengths", "batch_sizes", "prompt_lengths"):
            numbers = getattr(self, name)
            if not numbers or numbers[0] < 1 or any(a >= b for a, b in pairwise(numbers)):
                given = ",".join(map(str, numbers)) or "empty"
                raise UserError(
                    f"{name} is {given}; give whole numbers of at least 1 in rising order, for "
                    "example 32,64,128"
                )
        for name in ("max_new_tokens", "slots", "long_slots"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def longest(self) -> int:
        return self.lengths[-1]

    @property
    def longest_target(self) -> int:
        return max(one.length for one in self.targets)

    @cached_property
    def pools(self) -> tuple[SlotPool, ...]:
        """The slots of the shorter half of ``lengths``, then those of the others, if any."""
        half = (len(self.lengths) + 1) // 2
        short = SlotPool(slots=range(self.slots), lengths=self.lengths[:half])
        if half == len(self.lengths):
            return (short,)
        long = range(self.slots, self.slots + self.long_slots)
        return short, SlotPool(slots=long, lengths=self.lengths[half:])

    def pool_of(self, length: int) -> SlotPool:
        """Returns the slots for inputs that are padded to this length."""
        return next(pool for pool in self.pools if length <= pool.lengths[-1])

    def length_for(self, tokens: int) -> int | None:
        """Returns the shortest length that holds this many tokens."""
        return _first(self.lengths, tokens)

    def prompt_length_for(self, tokens: int) -> int | None:
        return _first(self.prompt_lengths, tokens)

    def targets_for(self, number: int, length: int) -> Targets | None:
        """Returns the smallest that holds this many targets of this length."""
        return next((one for one in self.targets if one.holds(number, length)), None)

    def targets_at_once(self, longest: int) -> int:
        """Returns how many targets of at most ``longest`` tokens one row can have."""
        return max(one.number for one in self.targets if one.length >= longest)

    def programs(self, adapter_spec: AdapterSpec | None = None) -> Iterator[Program]:
        """Yields every program that reads inputs for plain prompts or one spec, smallest first."""
        prompt_lengths = self._prompt_lengths(adapter_spec)
        for length, rows, prompt in product(self.lengths, self.batch_sizes, prompt_lengths):
            shape: Any = {
                "length": length,
                "rows": rows,
                "prompt_length": prompt,
                "adapter_spec": adapter_spec,
            }
            if {"label", "score"} & {*self.modes}:
                for targets in self.targets:
                    yield Program(kind="score", targets=targets, **shape)
            if self.generates(adapter_spec):
                yield Program(kind="generate", **shape)

    def generates(self, adapter_spec: AdapterSpec | None) -> bool:
        """Returns whether there are programs that generate text for this spec."""
        return "generate" in self.modes and (adapter_spec is None or adapter_spec.generates)

    def widths(self, pool: SlotPool, adapter_spec: AdapterSpec | None = None) -> tuple[int, ...]:
        """Returns the numbers of encoder positions that the decoder attends to in these slots."""
        prompt_lengths = self._prompt_lengths(adapter_spec)
        return tuple(sorted({p + t for p in prompt_lengths for t in pool.lengths}))

    def _prompt_lengths(self, adapter_spec: AdapterSpec | None) -> tuple[int, ...]:
        return self.prompt_lengths if adapter_spec is None else (adapter_spec.prompt_positions,)


def targets_of(
    label_sets: Iterable[Sequence[Sequence[int]]], *, longest: int
) -> tuple[Targets, ...]:
    """Returns shapes for sets of labels and for one target of any length.

    Labels are token ids with their end.
    """
    numbers, lengths = [2], [2]
    for labels in label_sets:
        numbers.append(len(labels))
        lengths += [len(ids) for ids in labels if len(ids) <= _MAX_LABEL_LENGTH]
    number = min(_MAX_LABELS, _power_of_two(max(numbers)))
    length = min(longest, _power_of_two(max(lengths)))
    one = Targets(number=1, length=longest)
    few = Targets(number=number, length=length)
    return (few,) if few.holds(1, longest) else (few, one)


def prompt_lengths_of(lengths: Iterable[int], *, longest: int) -> tuple[int, ...]:
    """Returns at most two lengths to pad prompts to; the last is ``longest``."""
    known = np.asarray([*lengths, longest])
    if known.min() == known.max():
        return (longest,)
    shorter = Buckets(most=_PROMPT_LENGTHS).choose(known, limit=longest)
    return tuple(sorted({*shorter, longest}))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One input with one prompt or trained method (None: the bare model), and what to compute.

    ``ids`` and ``targets`` include their end of sequence; of an image, ``ids`` are its pixels.
    ``limit`` is in tokens; the other options of generation are those of ``LogitsProcessors``.
    """

    ids: tuple[int, ...] | HostArray
    prompt: Served | None = None
    targets: tuple[tuple[int, ...], ...] = ()
    limit: int = 0
    min_length: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0

    @property
    def adapter_spec(self) -> AdapterSpec | None:
        return None if self.prompt is None else self.prompt.adapter_spec


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """For each row the most tokens to generate, and what changes their scores."""

    limit_B: Any
    processors: LogitsProcessors


def token_array(
    rows: Sequence[Row], program: Program, ids: TokenIds, *, images: bool = False
) -> HostArray:
    """Returns ``[B, T]``, each input followed by padding; or ``images``, uint8."""
    shape = (program.rows, program.length)
    tokens_BT: HostArray = np.full(shape, ids.fill, np.int32)
    if images:
        tokens_BT = np.zeros(shape, np.uint8)
    for tokens_T, row in zip(tokens_BT, rows, strict=False):
        tokens_T[: len(row.ids)] = row.ids
    return tokens_BT


def target_array(rows: Sequence[Row], program: Program, ids: TokenIds) -> HostArray:
    """Returns ``[B, C, S]``, each target followed by padding."""
    assert program.targets is not None
    shape = (program.rows, program.targets.number, program.targets.length)
    targets_BCS = np.full(shape, ids.fill, np.int32)
    targets_BCS[:, :, 0] = ids.eos  # unused targets are an empty text
    for targets_CS, row in zip(targets_BCS, rows, strict=False):
        for target_S, tokens in zip(targets_CS, row.targets, strict=False):
            target_S[: len(tokens)] = tokens
    return targets_BCS


def decode_options(rows: Sequence[Row], program: Program, *, max_new_tokens: int) -> DecodeOptions:
    """Returns each field as ``[B]``; unused rows generate one token."""

    def column(values: list[Any], *, unused: Any, dtype: Any) -> HostArray:
        array_B = np.full(program.rows, unused, dtype)
        array_B[: len(values)] = values
        return array_B

    limits = [min(row.limit, max_new_tokens) for row in rows]
    penalties = [row.repetition_penalty for row in rows]
    ngram_sizes = [row.no_repeat_ngram_size for row in rows]
    return DecodeOptions(
        limit_B=column(limits, unused=1, dtype=np.int32),
        processors=LogitsProcessors(
            min_length=column([row.min_length for row in rows], unused=0, dtype=np.int32),
            repetition_penalty=column(penalties, unused=1, dtype=np.float32),
            no_repeat_ngram_size=column(ngram_sizes, unused=0, dtype=np.int32),
        ),
    )


def _first(rising: Sequence[int], needed: int) -> int | None:
    return next((one for one in rising if one >= needed), None)


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
