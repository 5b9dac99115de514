"""A corpus of plain text files, tokenized once, cached, and then memory-mapped.

Files are UTF-8, plain or compressed with xz or gzip.  Each line is a paragraph; blank lines
separate documents.
"""

import gzip
import hashlib
import io
import itertools
import lzma
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TextIO, TypeAlias, cast

import numpy as np

from prompt_tuning_jax.data.vocabularies.vocab import AnyVocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.storage import user_cache

SUFFIXES = (".txt", ".xz", ".gz")

PathLike: TypeAlias = str | os.PathLike[str]
# Called with the completed fraction, 0 to 1, and the number of tokens so far.
Progress: TypeAlias = Callable[[float, int], None]

_DECOMPRESSORS: dict[str, Callable[[IO[bytes]], object]] = {".xz": lzma.open, ".gz": gzip.open}
_FORMAT = 1  # cache format version, part of the cache key
_CHARACTERS_PER_BATCH = 4_000_000
_THREADS = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """The concatenated tokens of all documents, and the index where each document starts.

    ``tokens`` is a flat uint16 or int32 array without end-of-sequence tokens.
    ``document_starts`` is an int64 array that increases from 0.
    """

    tokens: np.ndarray
    document_starts: np.ndarray


def load_corpus(
    path: PathLike | Sequence[PathLike],
    vocabulary: AnyVocabulary,
    *,
    cache_dir: PathLike | None = None,
    max_files: int | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """Returns the tokens of a folder, a file or a list of files, cached after the first call.

    The cache is ``cache_dir``, or by default ``prompt_tuning_jax`` in ``$XDG_CACHE_HOME`` or
    ``~/.cache``.  The cache key covers the vocabulary and the names, sizes and modification times
    of the files.  ``max_files`` limits the corpus to the first files, for quick experiments.

    Raises UserError if there are no files, the files are empty or not valid text, ``max_files`` is
    less than 1, or the cache cannot be written.
    """
    if max_files is not None and max_files < 1:
        raise UserError(f"max_files must be 1 or more, not {max_files}")
    files = text_files(path)[:max_files]
    name = f"corpus-{_key(files, vocabulary)}"
    folder = user_cache(name) if cache_dir is None else Path(cache_dir) / name
    corpus = _open(folder)
    if corpus is None:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            _build(files, vocabulary, folder=folder, progress=progress)
        except OSError as error:
            raise UserError(f"cannot write the corpus cache {folder}: {error}") from None
        corpus = _open(folder)
        assert corpus is not None, f"{folder} vanished"
    return corpus


def text_files(path: PathLike | Sequence[PathLike]) -> list[Path]:
    """Returns the absolute paths of the text files in a folder, sorted by name, or of given files.

    In a folder, files with uppercase names (README.txt, BOOKS.txt) describe the text and are
    skipped.  Raises UserError if there is no text file or a given file does not exist.
    """
    if isinstance(path, str | os.PathLike) and Path(path).is_dir():
        candidates = sorted(f for f in Path(path).iterdir() if f.is_file() and f.suffix in SUFFIXES)
        files = [f for f in candidates if not f.name.split(".")[0].isupper()]
        if not files:
            raise UserError(f"{path}: the folder holds no text file ({', '.join(SUFFIXES)})")
    else:
        files = [Path(path)] if isinstance(path, str | os.PathLike) else [Path(p) for p in path]
        if not files:
            raise UserError("the corpus is an empty list of files; give at least one")
        for file in files:
            if not file.is_file():
                raise UserError(f"{file}: no such text file")
    return [file.resolve() for file in files]


@contextmanager
def open_text(file: Path) -> Iterator[tuple[TextIO, IO[bytes]]]:
    """Opens a text file, decompressed according to its suffix.

    Yields the text and the raw stream beneath it, whose position shows the progress.  Raises
    UserError if the file cannot be read, is not UTF-8, or is damaged.
    """
    try:
        with open(file, "rb") as raw:
            stream = cast(IO[bytes], _DECOMPRESSORS.get(file.suffix, lambda raw: raw)(raw))
            with io.TextIOWrapper(stream, encoding="utf-8") as text:
                yield text, raw
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason}); convert it") from None
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{file}: damaged compressed file ({error})") from None
    except OSError as error:
        raise UserError(f"{file}: cannot read it: {error.strerror}") from None


def _key(files: Sequence[Path], vocabulary: AnyVocabulary) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {vocabulary.fingerprint}".encode())
    for file in files:
        status = file.stat()
        digest.update(f"\0{file}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    return digest.hexdigest()[:20]


def _open(folder: Path) -> Corpus | None:
    """Returns the corpus in a cache folder, or None if it is missing or damaged."""
    try:
        tokens = np.load(folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
        starts = np.load(folder / "document_starts.npy", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    # Return a plain array view, because indexing an np.memmap is slower.
    return Corpus(tokens=tokens.view(np.ndarray), document_starts=starts)


def _build(
    files: Sequence[Path], vocabulary: AnyVocabulary, *, folder: Path, progress: Progress | None
) -> None:
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        starts: list[int] = []
        with _TokenFile(aside / "tokens.npy", dtype=_token_dtype(vocabulary)) as out:
            for paragraphs, fraction in _paragraph_batches(files):
                encoded = vocabulary.encode_batch(paragraphs, num_threads=_THREADS)
                offset = out.count
                for text, ids in zip(paragraphs, encoded, strict=True):
                    # An empty text starts a new document; documents without tokens are skipped.
                    if not text and (not starts or offset > starts[-1]):
                        starts.append(offset)
                    offset += len(ids)
                out.append(encoded)
                if progress is not None:
                    progress(fraction, out.count)
        if not out.count:
            raise UserError(f"{files[0].parent}: the {len(files)} text files hold no text")
        starts = [start for start in starts if start < out.count]
        np.save(aside / "document_starts.npy", np.asarray(starts, dtype="<i8"), allow_pickle=False)
        if folder.is_dir() and _open(folder) is None:
            shutil.rmtree(folder)  # damaged
        try:
            aside.rename(folder)
        except OSError:
            if _open(folder) is None:  # otherwise another process wrote the same content first
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _token_dtype(vocabulary: AnyVocabulary) -> np.dtype:
    return np.dtype("<u2" if vocabulary.size <= 2**16 else "<i4")


def _paragraph_batches(files: Sequence[Path]) -> Iterator[tuple[list[str], float]]:
    """Yields batches of paragraphs, with '' before each document, and the fraction read."""
    total = sum(file.stat().st_size for file in files) or 1
    done = 0
    for file in files:
        with open_text(file) as (text, raw):
            batch, characters = [""], 0
            for line in text:
                batch.append(line.strip())
                characters += len(line)
                if characters >= _CHARACTERS_PER_BATCH:
                    yield batch, min(1.0, (done + raw.tell()) / total)
                    batch, characters = [], 0
        done += file.stat().st_size
        yield batch, min(1.0, done / total)


class _TokenFile:
    """Writes a flat .npy file piece by piece, and rewrites its fixed-width header at the end."""

    def __init__(self, path: Path, *, dtype: np.dtype) -> None:
        self.count = 0
        self._path = path
        self._dtype = dtype

    def append(self, sequences: Sequence[Sequence[int]]) -> None:
        tokens = np.fromiter(itertools.chain.from_iterable(sequences), dtype=self._dtype)
        self._file.write(tokens.tobytes())
        self.count += len(tokens)

    def _write_header(self) -> int:
        self._file.seek(0)
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.count,)}
        np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()

    def __enter__(self) -> "_TokenFile":
        self._file = open(self._path, "wb")
        self._header_size = self._write_header()
        return self

    def __exit__(self, *_: object) -> None:
        # NumPy pads the header for a first axis of up to 21 digits, so it can be rewritten.
        assert self._write_header() == self._header_size
        self._file.close()
