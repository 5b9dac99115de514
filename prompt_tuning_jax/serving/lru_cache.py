"""Which of a few places on the device holds what; the least recently used make room."""

from collections import OrderedDict
from collections.abc import Iterable


class Places:
    """N places for more things than N, each by its number."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.clear()

    def __getitem__(self, thing: int) -> int:
        return self._at[thing]

    def clear(self) -> None:
        """Nothing is anywhere."""
        self._at: OrderedDict[int, int] = OrderedDict()
        self._free = list(range(self._number))[::-1]

    def take(self, wanted: Iterable[int]) -> list[int]:
        """All that is wanted, N at most and each once, has a place; those whose place is new."""
        wanted = list(wanted)
        missing = [thing for thing in wanted if thing not in self._at]
        for thing in wanted:
            if thing in self._at:
                self._at.move_to_end(thing)
        for thing in missing:
            # Never one of those wanted now: they have just been moved to the end.
            self._at[thing] = self._free.pop() if self._free else self._at.popitem(last=False)[1]
        return missing
