"""Counts what the loops of a compiled program cost beyond XLA's analysis.

XLA counts the body of a loop once.  The other iterations are added here: the FLOPs of a body's
products, and the bytes that its operations read and write.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from prompt_tuning_jax.planning.hlo import bytes_of, lines, times

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*?)\)(.*)$")
_NAME = re.compile(r"%([\w.-]+)")
_CALLS = re.compile(r"calls=%?([\w.-]+)")
_DIMS = re.compile(r"\[([\d,]*)\]")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")

# A kernel says itself what it costs.
_ESTIMATED_FLOPS = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')
_ESTIMATED_BYTES = re.compile(r'"cost_estimate":\{[^}]*"bytes_accessed":"(\d+)"')

# Names for parts of buffers, control flow, and the second halves of asynchronous operations.
_FREE = re.compile(
    r"parameter|constant|tuple|get-tuple-element|bitcast|while|conditional|call|after-all"
    r"|opt-barrier|partition-id|replica-id|iota|.*-done"
)
_PARTS = ("slice", "dynamic-slice", "gather")  # they read as much as they return


@dataclass(frozen=True, kw_only=True)
class Cost:
    """FLOPs of products, and bytes read and written."""

    flops: float
    bytes: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(flops=self.flops + other.flops, bytes=self.bytes + other.bytes)

    def __mul__(self, number: int) -> "Cost":
        return Cost(flops=self.flops * number, bytes=self.bytes * number)


@dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    kind: str
    operands: tuple[str, ...]
    attributes: str


_Computations = Mapping[str, Mapping[str, _Instruction]]


def repeated_cost(text: str) -> Cost:
    """Returns the cost of all iterations but the first of the loops of a compiled program."""
    computations = _parsed(text)
    fused = set(_CALLS.findall(text))
    total = Cost(flops=0.0, bytes=0.0)
    for name, number in times(text):
        if number > 1 and name not in fused and name in computations:
            total += _cost_of(computations[name], computations) * (number - 1)
    return total


def entry_cost(text: str) -> Cost:
    """Returns the cost of a compiled program's entry, without its loops."""
    entry = re.search(r"^ENTRY %?([\w.-]+)", text, re.MULTILINE)
    assert entry is not None
    computations = _parsed(text)
    return _cost_of(computations[entry[1]], computations)


def _parsed(text: str) -> _Computations:
    computations: dict[str, dict[str, _Instruction]] = {}
    for computation, line in lines(text):
        if match := _INSTRUCTION.match(line):
            name, shape, kind, operands, attributes = match.groups()
            computations.setdefault(computation, {})[name] = _Instruction(
                name, shape, kind, tuple(_NAME.findall(operands)), attributes
            )
    return computations


def _cost_of(computation: Mapping[str, _Instruction], computations: _Computations) -> Cost:
    flops = float(sum(_flops(each, computation) for each in computation.values()))
    size = 0.0
    for each in computation.values():
        if each.kind == "fusion":
            inner = computations[_CALLS.findall(each.attributes)[0]]
            flops += sum(_flops(instruction, inner) for instruction in inner.values())
            size += _bytes_of_fusion(each, computation, inner)
        elif not _FREE.fullmatch(each.kind):
            size += _bytes(each, computation)
    return Cost(flops=flops, bytes=size)


def _bytes(each: _Instruction, within: Mapping[str, _Instruction]) -> float:
    if each.kind == "custom-call" and (estimated := _ESTIMATED_BYTES.search(each.attributes)):
        return float(estimated[1])
    result = bytes_of(each.shape)
    if each.kind.endswith("-start"):  # the result names operand and destination
        return result
    if each.kind in _PARTS:
        return 2 * result
    if each.kind == "dynamic-update-slice":
        return 2 * bytes_of(within[each.operands[1]].shape)
    return result + sum(bytes_of(within[name].shape) for name in each.operands if name in within)


def _bytes_of_fusion(
    each: _Instruction, within: Mapping[str, _Instruction], inner: Mapping[str, _Instruction]
) -> float:
    """Counts what a fusion writes, and of its operands what it reads."""
    users: dict[str, list[_Instruction]] = {}
    for instruction in inner.values():
        for name in instruction.operands:
            users.setdefault(name, []).append(instruction)

    def final(name: str) -> Iterator[tuple[str, _Instruction]]:
        """Yields the operations that read a value, through bitcasts."""
        for user in users.get(name, ()):
            if user.kind == "bitcast":
                yield from final(user.name)
            else:
                yield name, user

    size = 0.0
    for instruction in inner.values():
        if instruction.kind != "parameter":
            continue
        whole = bytes_of(instruction.shape)
        read = 0.0
        for name, user in final(instruction.name):
            if user.kind in _PARTS and user.operands[0] == name:
                read += bytes_of(user.shape)
            elif user.kind != "dynamic-update-slice" or user.operands[0] != name:
                read = whole
                break
        size += min(read, whole)
    updates = [
        instruction for instruction in inner.values() if instruction.kind == "dynamic-update-slice"
    ]
    if updates:  # in place
        return size + sum(bytes_of(inner[instruction.operands[1]].shape) for instruction in updates)
    return size + bytes_of(each.shape)


def _flops(each: _Instruction, within: Mapping[str, _Instruction]) -> int:
    """Counts the multiplications and additions of products; 0 for other operations."""
    if each.kind == "dot":
        match = _CONTRACTED.search(each.attributes)
        assert match is not None
        dims = _dims(within[each.operands[0]].shape)
        summed = [dims[int(i)] for i in match[1].split(",") if i]
        return 2 * math.prod(_dims(each.shape)) * math.prod(summed)
    if each.kind == "custom-call" and (estimated := _ESTIMATED_FLOPS.search(each.attributes)):
        return int(estimated[1])
    if each.kind != "convolution":
        return 0
    match = _LABELS.search(each.attributes)
    assert match is not None
    left, right = (_dims(within[name].shape) for name in each.operands[:2])
    out = _dims(each.shape)
    products = math.prod(
        _products(left[match[1].index(d)], right[match[2].index(d)], out[match[3].index(d)], window)
        for d, window in zip(
            sorted(filter(str.isdigit, match[1])), _windows(each.attributes, match[1]), strict=True
        )
    )
    rows, columns = out[match[3].index("b")], out[match[3].index("f")]
    return 2 * rows * columns * right[match[2].index("i")] * products


def _windows(attributes: str, labels: str) -> list[dict[str, str]]:
    """Returns what a convolution's window says about each spatial dimension."""
    match = _WINDOW.search(attributes)
    number = sum(map(str.isdigit, labels))
    windows: list[dict[str, str]] = [{} for _ in range(number)]
    for field in match[1].split() if match else ():
        name, _, values = field.partition("=")
        for window, value in zip(windows, values.split("x"), strict=True):
            window[name] = value
    return windows


def _products(left: int, right: int, out: int, window: Mapping[str, str]) -> int:
    """Counts the pairs of output and kernel positions that meet a position of the input."""
    low = int(window.get("pad", "0_0").split("_")[0])
    positions = (
        np.arange(out)[:, None] * int(window.get("stride", 1))
        + np.arange(right)[None, :] * int(window.get("rhs_dilate", 1))
        - low
    )
    dilated = int(window.get("lhs_dilate", 1))
    inside = (positions >= 0) & (positions <= (left - 1) * dilated)
    return int(np.sum(inside & (positions % dilated == 0)))


def _dims(shape: str) -> list[int]:
    match = _DIMS.search(shape)
    return [int(n) for n in match[1].split(",") if n] if match else []
