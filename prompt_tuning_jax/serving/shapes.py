"""The few shapes that a server computes in.

A program is made for a length of input, a number of rows, a length of prompts and, where targets
are scored, their number and length.  Whatever comes is padded into one that is compiled, or cut
into several rows: no request waits for compilation.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any, Literal, TypeAlias

from prompt_tuning_jax.data.batching.buckets import Buckets
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.serving.adapter_spec import AdapterSpec

# Texts are written in slots that rows enter and leave (generate), or by a whole batch (write).
Kind: TypeAlias = Literal["score", "generate", "write"]
KINDS: tuple[Kind, ...] = ("score", "generate")
# Label sets beyond these are scored in several rows, long labels one by one.
_MOST_LABELS, _LONGEST_LABEL = 16, 8
_PROMPT_LENGTHS = 2


@dataclass(frozen=True, kw_only=True)
class Targets:
    """C target strings of S tokens each beside every input."""

    number: int
    length: int

    def holds(self, number: int, length: int) -> bool:
        return number <= self.number and length <= self.length


@dataclass(frozen=True, kw_only=True)
class Program:
    """One compiled function: T, B, P, and the targets that it scores (None: it scores none).

    With a ``adapter_spec`` it is for a method that is no plain prompt.
    """

    kind: Kind
    length: int
    rows: int
    prompt_length: int
    targets: Targets | None = None
    adapter_spec: AdapterSpec | None = None

    def does_work_of(self, other: "Program") -> bool:
        """Whether all that ``other`` takes fits into this one, to the same result."""
        same = (self.kind, self.targets, self.adapter_spec)
        return same == (other.kind, other.targets, other.adapter_spec) and (
            self.length >= other.length
            and self.rows >= other.rows
            and self.prompt_length >= other.prompt_length
        )


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """``lengths`` of inputs in tokens with their end, ``batch_sizes`` in rows, both rising.

    ``prompt_lengths`` rise too, and 0 is none of them; ``targets`` are from the smallest on;
    ``max_new_tokens`` is the most that is written, ``slots`` how many rows are written at once.
    """

    lengths: tuple[int, ...] = (32, 64, 128, 256, 512)
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    prompt_lengths: tuple[int, ...] = (100,)
    targets: tuple[Targets, ...] = (Targets(number=4, length=4), Targets(number=1, length=64))
    max_new_tokens: int = 64
    slots: int = 16
    kinds: tuple[Kind, ...] = KINDS

    def __post_init__(self) -> None:
        for name in ("lengths", "batch_sizes", "prompt_lengths"):
            numbers = getattr(self, name)
            if not numbers or numbers[0] < 1 or any(a >= b for a, b in pairwise(numbers)):
                given = ",".join(map(str, numbers)) or "empty"
                raise UserError(f"{name} is {given}; give whole numbers from 1, rising: 32,64,128")
        for name in ("max_new_tokens", "slots"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def longest(self) -> int:
        return self.lengths[-1]

    @property
    def longest_target(self) -> int:
        return max(one.length for one in self.targets)

    def length_for(self, tokens: int) -> int | None:
        """The shortest length that holds so many tokens."""
        return _first(self.lengths, tokens)

    def prompt_length_for(self, tokens: int) -> int | None:
        return _first(self.prompt_lengths, tokens)

    def targets_for(self, number: int, length: int) -> Targets | None:
        """The smallest that holds so many targets of such a length."""
        return next((one for one in self.targets if one.holds(number, length)), None)

    def targets_at_once(self, longest: int) -> int:
        """How many targets of at most ``longest`` tokens one row can have."""
        return max(one.number for one in self.targets if one.length >= longest)

    def programs(self) -> Iterator[Program]:
        """Everything that reads inputs for plain prompts; the smallest first."""
        for length, rows, prompt in product(self.lengths, self.batch_sizes, self.prompt_lengths):
            shape: Any = {"length": length, "rows": rows, "prompt_length": prompt}
            if "score" in self.kinds:
                for targets in self.targets:
                    yield Program(kind="score", targets=targets, **shape)
            if "generate" in self.kinds:
                yield Program(kind="generate", **shape)

    def programs_of(self, adapter_spec: AdapterSpec) -> Iterator[Program]:
        """The same for methods of this structure, which score and write in batches of their own."""
        for length, rows in product(self.lengths, self.batch_sizes):
            shape: Any = {"length": length, "rows": rows, "prompt_length": 0}
            if "score" in self.kinds:
                for targets in self.targets:
                    yield Program(kind="score", targets=targets, adapter_spec=adapter_spec, **shape)
            if "generate" in self.kinds and not adapter_spec.label_tokens:
                yield Program(kind="write", adapter_spec=adapter_spec, **shape)

    def widths(self) -> tuple[int, ...]:
        """How many positions of the encoder's output the decoder may have to look at."""
        return tuple(sorted({p + t for p in self.prompt_lengths for t in self.lengths}))


def targets_of(
    label_sets: Iterable[Sequence[Sequence[int]]], *, longest: int
) -> tuple[Targets, ...]:
    """Shapes for sets of labels (token ids with their end) and for one target of any length."""
    numbers, lengths = [2], [2]
    for labels in label_sets:
        numbers.append(len(labels))
        lengths += [len(ids) for ids in labels if len(ids) <= _LONGEST_LABEL]
    number = min(_MOST_LABELS, _power_of_two(max(numbers)))
    length = min(longest, _power_of_two(max(lengths)))
    one = Targets(number=1, length=longest)
    few = Targets(number=number, length=length)
    return (few,) if few.holds(1, longest) else (few, one)


def prompt_lengths_of(lengths: Iterable[int], *, longest: int) -> tuple[int, ...]:
    """At most two lengths to pad prompts to, the last of them ``longest``."""
    import numpy as np

    known = np.asarray([*lengths, longest])
    if known.min() == known.max():
        return (longest,)
    shorter = Buckets(most=_PROMPT_LENGTHS).choose(known, limit=longest)
    return tuple(sorted({*shorter, longest}))


def _first(rising: Sequence[int], needed: int) -> int | None:
    return next((one for one in rising if one >= needed), None)


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
