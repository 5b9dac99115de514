"""Splits made of parts of other splits, as ``train[:-1000]`` in TensorFlow Datasets."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice

from prompt_tuning_jax.data.tasks.task import Row, Source


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows of a split: all of them, all but the last ``without_last``, or only the ``last``."""

    split: str
    without_last: int = 0
    last: int = 0

    def of(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yields the part of the rows, reading them once."""
        if self.last:
            yield from deque(rows, maxlen=self.last)
            return
        iterator = iter(rows)
        ahead = deque(islice(iterator, self.without_last))
        for row in iterator:
            ahead.append(row)
            yield ahead.popleft()


def with_parts(source: Source, parts: Mapping[str, Part]) -> Source:
    """Returns the source with these splits instead of its own."""
    return Source(
        splits=tuple(parts),
        rows=partial(_rows, source=source, parts=dict(parts)),
        fingerprint=partial(_fingerprint, source=source, parts=dict(parts)),
        note=partial(_note, source=source, parts=dict(parts)),
    )


def _rows(split: str, data_dir: str, *, source: Source, parts: Mapping[str, Part]) -> Iterator[Row]:
    part = parts[split]
    return part.of(source.rows(part.split, data_dir))


def _fingerprint(split: str, data_dir: str, *, source: Source, parts: Mapping[str, Part]) -> str:
    part = parts[split]
    whole = source.fingerprint(part.split, data_dir)
    return f"{whole} without {part.without_last} last {part.last}"


def _note(split: str, data_dir: str, *, source: Source, parts: Mapping[str, Part]) -> str:
    return source.note(parts[split].split, data_dir)
