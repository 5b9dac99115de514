"""Finds the collectives in the text of a compiled program."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "token": 0}
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\]")
_OPERATION = re.compile(r"^\s*(?:ROOT\s+)?%?[\w.-]+ = (.*?) ([a-z-]+)\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|called_computations=\{)=?%?([\w.-]+)")
_TRIPS = re.compile(r'known_trip_count"?:?\s*\{\s*"?n"?:\s*"?(\d+)')
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_CONSTANT = re.compile(r"^\s*%?([\w.-]+) = s32\[\]\S* constant\((\d+)\)")
_LESS = re.compile(r"^\s*ROOT .* compare\(\S+, %?([\w.-]+)\), direction=LT")
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{} ]*\})\}")


@dataclass(frozen=True, kw_only=True)
class Collective:
    """All collectives of one kind over the same mesh axes: their number and size per step.

    ``axes`` are the mesh axes along which they communicate.  ``bytes`` is the total size of their
    results on one chip; for a reduce-scatter, whose result is only a part, it is that of the
    operands.  ``sent`` is the number of bytes that one chip sends in a ring of ``group`` chips.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    count: int
    bytes: int

    @property
    def sent(self) -> float:
        share = (self.group - 1) / self.group
        if self.kind == "collective-permute":
            return float(self.bytes)
        return self.bytes * share * (2 if self.kind == "all-reduce" else 1)


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """Returns the collectives of a compiled program by kind and mesh axes, the largest first.

    ``mesh`` maps each axis to its size; device numbers increase along the last axis first.
    Collectives in a loop are multiplied by its trip count, where the compiler knows it.
    """
    runs = dict(times(text))
    counts: dict[tuple[str, tuple[str, ...], int], list[int]] = defaultdict(lambda: [0, 0])
    for computation, line in lines(text):
        match = _OPERATION.match(line)
        if not match:
            continue
        kind = match[2].removesuffix("-start")
        if kind not in KINDS:  # this also skips the "-done" of an asynchronous collective
            continue
        groups = _groups(line, math.prod(mesh.values()))
        group = max(map(len, groups), default=1)
        if group < 2:
            continue
        number = runs.get(computation, 1)
        size = _bytes(match[1], started=match[2].endswith("-start"), kind=kind)
        if kind == "reduce-scatter":
            size *= group
        total = counts[kind, _axes(groups, mesh), group]
        total[0] += number
        total[1] += number * size
    found_all = [
        Collective(kind=kind, axes=axes, group=group, count=count, bytes=size)
        for (kind, axes, group), (count, size) in counts.items()
    ]
    return sorted(found_all, key=lambda c: -c.bytes)


def lines(text: str) -> Iterator[tuple[str, str]]:
    """Yields the name of the computation and the text of each line of the program."""
    computation = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            computation = match[2]
        else:
            yield computation, line


def times(text: str) -> Iterator[tuple[str, int]]:
    """Yields each computation that is called, and how often it runs in one run of the program."""
    limits = dict(_limits(text))
    callers: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for computation, line in lines(text):
        trips = 1
        if " while(" in line:
            known, condition = _TRIPS.search(line), _CONDITION.search(line)
            trips = int(known[1]) if known else limits.get(condition[1] if condition else "", 1)
        for called in _CALLED.findall(line):
            callers[called].append((computation, trips))

    def number(name: str, seen: tuple[str, ...] = ()) -> int:
        above = [c for c in callers.get(name, ()) if c[0] not in seen and c[0] != name]
        return sum(n * number(caller, (*seen, name)) for caller, n in above) if above else 1

    for name in list(callers):
        yield name, number(name)


def _limits(text: str) -> Iterator[tuple[str, int]]:
    """Yields the conditions that compare a counter from 0 with a constant, and that constant."""
    constants: dict[tuple[str, str], int] = {}
    for computation, line in lines(text):
        if match := _CONSTANT.match(line):
            constants[computation, match[1]] = int(match[2])
        elif (match := _LESS.search(line)) and (computation, match[1]) in constants:
            yield computation, constants[computation, match[1]]


def bytes_of(shape: str) -> int:
    """Returns the bytes of an array, or of all arrays of a tuple."""
    return sum(_sizes(shape))


def _sizes(shape: str) -> list[int]:
    return [
        math.prod(int(n) for n in dims.split(",") if n) * _bits(dtype) // 8
        for dtype, dims in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", shape))
    ]


def _bytes(shape: str, *, started: bool, kind: str) -> int:
    """Returns the bytes of a result, without the operands that an asynchronous start includes."""
    sizes = _sizes(shape)
    if started and kind != "all-reduce" and len(sizes) > 1:
        return sum(sizes[len(sizes) // 2 :]) if kind == "all-gather" else max(sizes)
    return sum(sizes)


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 0


def _groups(line: str, devices: int) -> list[list[int]]:
    """Returns the groups of devices that communicate with each other."""
    if match := (_LISTED.search(line) or _PAIRS.search(line)):
        return [
            [int(n) for n in one.split(",") if n.strip()]
            for one in re.findall(r"\{([\d, ]*)\}", match[1])
        ]
    if match := _IOTA.search(line):
        shape, base, order = (
            [int(n) for n in part.split(",")] if part else None for part in match.groups()
        )
        assert shape is not None and base is not None
        numbers = np.arange(math.prod(base)).reshape(base)
        return np.transpose(numbers, order).reshape(shape).tolist()
    if match := _MESH.search(line):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        among = re.findall(r"'([^']+)'", match[2])
        names = list(sizes)
        numbers = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
        rest = [names.index(n) for n in names if n not in among]
        inner = [names.index(n) for n in among]
        width = math.prod(sizes[n] for n in among)
        return np.transpose(numbers, rest + inner).reshape(-1, width).tolist()
    return [list(range(devices))]


def _axes(groups: Sequence[Sequence[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the mesh axes along which the members of a group differ."""
    varying: set[int] = set()
    for group in groups:
        positions = np.stack(np.unravel_index(np.asarray(group), tuple(mesh.values())))
        varying |= set(np.flatnonzero((positions != positions[:, :1]).any(axis=1)).tolist())
    return tuple(name for i, name in enumerate(mesh) if i in varying)
