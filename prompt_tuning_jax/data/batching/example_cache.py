"""Tokenised examples on disk: a folder an entry, written aside, renamed, checked when opened."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prompt_tuning_jax.data.batching.ragged import Ragged
from prompt_tuning_jax.data.tasks.task import Example
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.storage import user_cache
from prompt_tuning_jax.untrusted_input import read_json

# Part of every key: raise it whenever the files below or the tokenisation change their meaning.
FORMAT_VERSION = 1

_TEXTS = "examples.jsonl"
_META = "meta.json"
_ARRAYS = ("inputs_flat", "inputs_offsets", "targets_flat", "targets_offsets")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is cached: uncut token ids, and the texts in the same order.

    ``load_texts`` reads them from the disk, or returns them where they are in memory.
    """

    inputs: Ragged
    targets: Ragged
    load_texts: Callable[[], list[Example]]


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/prompt_tuning_jax/examples``, ``~/.cache`` where that is not set."""
    return user_cache("examples")


def cache_key(parts: Sequence[str]) -> str:
    """The name of an entry: SHA-256 of all that it depends on and of the format's version."""
    return hashlib.sha256(json.dumps([FORMAT_VERSION, *parts]).encode()).hexdigest()


def open_entry(folder: Path) -> Entry | None:
    """Open an entry, memory-mapped; None where there is none or its files are damaged."""
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
    """Write an entry beside ``folder`` and rename it; of several writers the first one stays.

    ``about`` goes into ``meta.json`` for people to read.  Raises UserError if the folder cannot be
    written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f"{folder.name[:16]}.tmp-", dir=folder.parent))
        try:
            _write_files(aside, entry, about)
            _put_in_place(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
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


def _put_in_place(aside: Path, folder: Path) -> None:
    # A rename onto a folder that holds files fails, so that nobody sees half an entry.
    for _ in range(10):
        try:
            os.rename(aside, folder)
            return
        except OSError:
            if not folder.exists():
                raise
        if open_entry(folder) is not None:
            return  # another process was faster, and its entry equals ours
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
        return [read_json(line, of=str(path)) for line in file]


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
