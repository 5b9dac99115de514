"""Fields with a syntax of their own: what their text means, and which values are valid.

The rooms that act on these fields import the parsers from here.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.untrusted_input import compile_pattern

MESH_AXES = ("data", "fsdp", "model")
BALANCED = "balanced"  # as the only class weight
# ``auto``: more lengths than these save little, see scripts/bench_lengths.
_AUTO_BUCKETS = 4


def parse_buckets(text: str) -> tuple[tuple[int, ...], int]:
    """Returns ``data.buckets`` as the lengths that are given, and how many to choose automatically.

    >>> parse_buckets("64,128"), parse_buckets("auto:6"), parse_buckets("none")
    (((64, 128), 0), ((), 6), ((), 0))

    Raises:
      UserError: for any other text.
    """
    word, colon, number = text.strip().partition(":")
    try:
        if word == "none" and not colon:
            return (), 0
        if word == "auto":
            count = int(number) if colon else _AUTO_BUCKETS
            if count >= 1:
                return (), count
        elif not colon:
            lengths = tuple(int(part) for part in text.split(","))
            if lengths[0] >= 1 and all(a < b for a, b in pairwise(lengths)):
                return lengths, 0
    except ValueError:
        pass
    raise UserError(
        f"data.buckets is {text!r}; use auto, auto:N for at most N lengths, none for "
        "data.inputs_length only, or increasing lengths such as 64,128,256"
    )


def parse_class_weights(entries: Sequence[str]) -> dict[str, float]:
    """Returns ``data.class_weights`` as weights by label; empty for ``balanced``.

    >>> parse_class_weights(["a=b=2", "c=0.5"])
    {'a=b': 2.0, 'c': 0.5}

    Raises:
      UserError: for an entry that is not LABEL=WEIGHT, and for a label given twice.
    """
    if tuple(entries) == (BALANCED,):
        return {}
    weights: dict[str, float] = {}
    for entry in entries:
        label, weight = _name_and_factor(entry)
        if weight is None:
            raise UserError(
                f"data.class_weights: {entry!r} is neither LABEL=WEIGHT with a weight of at least "
                f"0, nor {BALANCED} as the only entry"
            )
        if label in weights:
            raise UserError(f"data.class_weights has the label {label!r} twice")
        weights[label] = weight
    return weights


def parse_rates(entries: Sequence[str]) -> list[tuple[Any, float]]:
    """Returns ``optimizer.rates`` as pairs of a compiled pattern and a factor.

    Raises:
      UserError: for an entry that is not REGEX=FACTOR.
    """
    rates = []
    for entry in entries:
        pattern, factor = _name_and_factor(entry)
        if not pattern or factor is None:
            raise UserError(
                f"optimizer.rates: {entry!r} is not REGEX=FACTOR with a factor of at least 0 "
                "on the learning rate, for example .*/lora_b_RF=16"
            )
        rates.append((compile_pattern(pattern, of="optimizer.rates"), factor))
    return rates


def parse_numbers(entries: Sequence[str], *, field: str) -> list[tuple[Any, float]]:
    """Entries ``REGEX=NUMBER`` as pairs of a compiled pattern and a number.

    Raises:
      UserError: for an entry of another form; the message begins with ``field``.
    """
    numbers = []
    for entry in entries:
        pattern, equals, text = entry.rpartition("=")
        try:
            number = float(text) if equals else math.nan
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"{field}: {entry!r} is not REGEX=NUMBER, for example .*/query=4")
        numbers.append((compile_pattern(pattern, of=field), number))
    return numbers


def first_match(numbers: Sequence[tuple[Any, float]], path: str, default: float) -> float:
    """Returns the number of the first pattern that matches the whole path."""
    return next((number for pattern, number in numbers if pattern.fullmatch(path)), default)


def _name_and_factor(entry: str) -> tuple[str, float | None]:
    """Returns ``NAME=FACTOR``; the factor is None if it is not a finite number of at least 0."""
    name, equals, text = entry.rpartition("=")
    try:
        factor = float(text)
    except ValueError:
        return name, None
    return name, factor if equals and 0 <= factor < math.inf else None


def parse_rules(entries: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Returns ``mesh.rules`` as the mesh axes of each logical axis; without any, it is replicated.

    >>> parse_rules(["embed=fsdp", "vocab=", "batch=data+fsdp"])
    {'embed': ('fsdp',), 'vocab': (), 'batch': ('data', 'fsdp')}

    Raises:
      UserError: for an entry of another form, and for a mesh axis that does not exist.
    """
    rules: dict[str, tuple[str, ...]] = {}
    for entry in entries:
        axis, equals, names = (part.strip() for part in entry.partition("="))
        mesh_axes = tuple(name.strip() for name in names.split("+")) if names else ()
        if not equals or not axis.isidentifier():
            raise UserError(
                f"mesh.rules: {entry!r} is not AXIS=MESH_AXIS, for example embed=fsdp, vocab= "
                "(replicated) or batch=data+fsdp"
            )
        for name in mesh_axes:
            if name not in MESH_AXES or mesh_axes.count(name) > 1:
                raise UserError(
                    f"mesh.rules: {entry!r} must name mesh axes of {', '.join(MESH_AXES)}, "
                    "each once"
                )
        if axis in rules:
            raise UserError(f"mesh.rules has {axis!r} twice; keep one")
        rules[axis] = mesh_axes
    return rules


def logits_processor_errors(
    *,
    min_length: int,
    repetition_penalty: float,
    no_repeat_ngram_size: int,
    max_length: int | None = None,
) -> Iterator[str]:
    """Yields what is wrong with options of text generation.

    Each message begins with the option's name.
    """
    for name, value in (
        ("min_length", min_length),
        ("no_repeat_ngram_size", no_repeat_ngram_size),
    ):
        if value < 0:
            yield f"{name} is {value}; it must be at least 0 (0: no limit)"
    if max_length is not None and min_length > max_length:
        yield f"min_length is {min_length}; it must be at most {max_length}, the longest output"
    if not (math.isfinite(repetition_penalty) and repetition_penalty > 0):
        yield f"repetition_penalty is {repetition_penalty}; it must be above 0 (1: none)"
