"""Tokenized examples in memory, as flat arrays, and on disk, one folder per cache entry.

An entry is written to a temporary folder and renamed, and checked when it is opened.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from prompt_tuning_jax.data.tasks.task import Example
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.storage import user_cache
from prompt_tuning_jax.untrusted_input import read_json


@dataclass(frozen=True, kw_only=True)
class Ragged:
    """Sequences of different lengths: ``flat[offsets[i]:offsets[i + 1]]``.

    Attributes:
      flat: [all tokens] int32; may be a memory-mapped file.
      offsets: [sequences + 1] int64.
      kept_at_end: the number of last tokens that truncation keeps, such as an end of sequence.
    """

    dtype: ClassVar[np.dtype] = np.dtype(np.int32)  # of ``padded``

    flat: np.ndarray
    offsets: np.ndarray
    kept_at_end: int = 1

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns one untruncated sequence."""
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        return np.asarray(self.flat[self.offsets[index] : self.offsets[index + 1]])

    @property
    def lengths(self) -> np.ndarray:
        """[sequences] int64, in tokens."""
        return np.diff(self.offsets)

    def num_longer_than(self, length: int) -> int:
        """Returns the number of sequences that ``padded`` truncates."""
        return int((self.lengths > length).sum())

    def padded(self, indices_B: np.ndarray, length: int, *, padding: int = 0) -> np.ndarray:
        """Gathers sequences -> [B, length] int32, padded.

        Longer sequences are truncated and still end with their last ``kept_at_end`` tokens (1: as
        after SeqIO's ``append_eos_after_trim``).
        """
        starts_B = np.asarray(self.offsets)[indices_B]
        lengths_B = np.asarray(self.offsets)[np.asarray(indices_B) + 1] - starts_B
        columns_T = np.arange(length)
        inside_BT = columns_T < lengths_B[:, None]
        # The last columns of truncated sequences are those of their ends.
        is_end_BT = (columns_T >= length - self.kept_at_end) & (lengths_B > length)[:, None]
        offsets_BT = columns_T + is_end_BT * (lengths_B - length)[:, None]
        positions_BT = (starts_B[:, None] + offsets_BT)[inside_BT]
        tokens_BT = np.full(inside_BT.shape, padding, np.int32)
        tokens_BT[inside_BT] = self.flat[positions_BT]
        return tokens_BT

    def select(self, indices: np.ndarray) -> "Ragged":
        """Returns the sequences at ``indices``, in that order."""
        return make_ragged([self[int(i)] for i in indices], kept_at_end=self.kept_at_end)


def make_ragged(sequences: Iterable[Sequence[int] | np.ndarray], *, kept_at_end: int = 1) -> Ragged:
    """Concatenates sequences; truncation keeps their last ``kept_at_end`` tokens."""
    arrays = [np.asarray(sequence, np.int32) for sequence in sequences]
    offsets = np.zeros(len(arrays) + 1, np.int64)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    flat = np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
    return Ragged(flat=flat, offsets=offsets, kept_at_end=kept_at_end)


# Part of every key: increase it whenever the files or the tokenization change.
FORMAT_VERSION = 1

_TEXTS = "examples.jsonl"
_META = "meta.json"
_ARRAYS = ("inputs_flat", "inputs_offsets", "targets_flat", "targets_offsets")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A cached split: untruncated token ids, and the texts in the same order.

    ``load_texts`` reads the texts from the disk, or returns them from memory.
    """

    inputs: Ragged
    targets: Ragged
    load_texts: Callable[[], list[Example]]


def default_cache_dir() -> Path:
    """Returns ``$XDG_CACHE_HOME/prompt_tuning_jax/examples``; the default is below ``~/.cache``."""
    return user_cache("examples")


def cache_key(parts: Sequence[str]) -> str:
    """Returns the name of an entry.

    It is the SHA-256 of everything that the entry depends on, and of the format's version.
    """
    return hashlib.sha256(json.dumps([FORMAT_VERSION, *parts]).encode()).hexdigest()


def open_entry(folder: Path) -> Entry | None:
    """Opens an entry, memory-mapped; None if there is none or its files are damaged."""
    try:
        meta = read_json((folder / _META).read_bytes(), of=str(folder / _META))
        for name in (_TEXTS, *(f"{array}.npy" for array in _ARRAYS)):
            if _file_digest(folder / name) != meta["sha256"][name]:
                raise ValueError(f"{name} has changed")
        arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in _ARRAYS
        }
    except FileNotFoundError as error:
        if folder.exists():
            _log.warning("rebuilding the cached examples in %s: no %s", folder, error.filename)
        return None
    except (UserError, OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("rebuilding the cached examples in %s: %s", folder, error)
        return None
    return Entry(
        inputs=Ragged(flat=arrays["inputs_flat"], offsets=np.asarray(arrays["inputs_offsets"])),
        targets=Ragged(flat=arrays["targets_flat"], offsets=np.asarray(arrays["targets_offsets"])),
        load_texts=lambda: _read_texts(folder / _TEXTS),
    )


def write_entry(folder: Path, entry: Entry, *, about: dict[str, Any]) -> None:
    """Writes an entry atomically; of several concurrent writers, the first one wins.

    ``about`` is written to ``meta.json`` for human readers.  Raises UserError if the folder cannot
    be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name[:16]}.tmp-", dir=folder.parent))
        try:
            _write_files(temporary, entry, about)
            _rename_to(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"{folder.parent}: cannot write the example cache ({error.strerror or error}); "
            "set XDG_CACHE_HOME to another folder or data.cache=False"
        ) from None


def _write_files(folder: Path, entry: Entry, about: dict[str, Any]) -> None:
    arrays = {
        "inputs_flat": entry.inputs.flat,
        "inputs_offsets": entry.inputs.offsets,
        "targets_flat": entry.targets.flat,
        "targets_offsets": entry.targets.offsets,
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
    with open(folder / _TEXTS, "w", encoding="utf-8") as file:
        for example in entry.load_texts():
            file.write(json.dumps(example) + "\n")
    digests = {path.name: _file_digest(path) for path in sorted(folder.iterdir())}
    meta = {**about, "format": FORMAT_VERSION, "sha256": digests}
    (folder / _META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _rename_to(temporary: Path, folder: Path) -> None:
    # Renaming to a folder with files fails, so nobody sees a partial entry.
    for _ in range(10):
        try:
            os.rename(temporary, folder)
            return
        except OSError:
            if not folder.exists():
                raise
        if open_entry(folder) is not None:
            return  # another process was faster, with an equal entry
        damaged = Path(tempfile.mkdtemp(prefix="damaged.tmp-", dir=folder.parent))
        try:
            os.rename(folder, damaged / folder.name)
        except FileNotFoundError:
            pass  # another process has moved it
        finally:
            shutil.rmtree(damaged, ignore_errors=True)
    raise OSError(f"{folder} cannot be replaced")


def _read_texts(path: Path) -> list[Example]:
    with open(path, encoding="utf-8") as file:
        # The file has its digest, and Python's JSON holds what examples may: NaN, lone surrogates.
        return [json.loads(line) for line in file]


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
