"""Token sequences of unequal lengths in one flat array, and their padding."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Ragged:
    """Sequence ``i`` is ``flat[offsets[i]:offsets[i + 1]]``; each ends in an end of sequence.

    Attributes:
      flat: [all tokens] int32; may be a memory-mapped file.
      offsets: [sequences + 1] int64.
    """

    flat: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """One sequence, uncut."""
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        return np.asarray(self.flat[self.offsets[index] : self.offsets[index + 1]])

    @property
    def lengths(self) -> np.ndarray:
        """[sequences] int64, EOS included."""
        return np.diff(self.offsets)

    def num_longer_than(self, length: int) -> int:
        """How many sequences ``padded`` cuts."""
        return int((self.lengths > length).sum())

    def padded(self, indices_B: np.ndarray, length: int, *, padding: int = 0) -> np.ndarray:
        """Gather sequences -> [B, length] int32, padded.

        A longer sequence is cut and still ends in its last token, as after SeqIO's
        ``append_eos_after_trim``.
        """
        starts_B = self.offsets[indices_B]
        lengths_B = self.offsets[np.asarray(indices_B) + 1] - starts_B
        columns_T = np.arange(length)
        inside_BT = columns_T < lengths_B[:, None]
        # Positions behind the end of the last sequence are masked, but must exist.
        positions_BT = np.minimum(starts_B[:, None] + columns_T, len(self.flat) - 1)
        tokens_BT = np.where(inside_BT, self.flat[positions_BT], padding).astype(np.int32)
        ends_B = self.flat[np.asarray(self.offsets)[np.asarray(indices_B) + 1] - 1]
        cut_B = lengths_B > length
        tokens_BT[cut_B, length - 1] = ends_B[cut_B]
        return tokens_BT

    def select(self, indices: np.ndarray) -> "Ragged":
        """The sequences at ``indices``, in that order."""
        return make_ragged([self[int(i)] for i in indices])


def make_ragged(sequences: Iterable[Sequence[int] | np.ndarray]) -> Ragged:
    """Concatenate sequences; EOS must be in them already."""
    arrays = [np.asarray(sequence, np.int32) for sequence in sequences]
    offsets = np.zeros(len(arrays) + 1, np.int64)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    flat = np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
    return Ragged(flat=flat, offsets=offsets)
