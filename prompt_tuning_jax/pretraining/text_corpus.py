"""A folder of plain text, tokenised once with a vocabulary and then read through mmap.

One paragraph a line, blank lines between documents, UTF-8, plain or compressed with xz or gzip.
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

SUFFIXES = (".txt", ".xz", ".gz")

PathLike: TypeAlias = str | os.PathLike[str]
# Called with the fraction that is done, 0 to 1, and the number of tokens so far.
Progress: TypeAlias = Callable[[float, int], None]

_DECOMPRESSORS: dict[str, Callable[[IO[bytes]], object]] = {".xz": lzma.open, ".gz": gzip.open}
_FORMAT = 1  # of the cache; part of its key
_CHARACTERS_PER_BATCH = 4_000_000
_THREADS = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Tokens of all documents end to end, and where each document starts.

    ``tokens`` is flat, uint16 or int32, without ends of sequence; ``document_starts`` is int64 and
    rises from 0.
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
    """The tokens of a folder, a file or a list of files, from the cache where they are there.

    The cache is ``cache_dir``, or ``prompt_tuning_jax`` in ``$XDG_CACHE_HOME`` or ``~/.cache``; its
    key covers names, sizes and times of the files and the vocabulary.  ``max_files`` takes the
    first ones alone, for quick experiments.  UserError where there is no file, no text, or no
    valid text.
    """
    if max_files is not None and max_files < 1:
        raise UserError(f"max_files must be 1 or more, not {max_files}")
    files = text_files(path)[:max_files]
    root = Path(cache_dir) if cache_dir is not None else _default_cache()
    folder = root / f"corpus-{_key(files, vocabulary)}"
    corpus = _open(folder)
    if corpus is None:
        try:
            root.mkdir(parents=True, exist_ok=True)
            _build(files, vocabulary, folder=folder, progress=progress)
        except OSError as error:
            raise UserError(f"cannot write the corpus cache {folder}: {error}") from None
        corpus = _open(folder)
        assert corpus is not None, f"{folder} vanished"
    return corpus


def text_files(path: PathLike | Sequence[PathLike]) -> list[Path]:
    """The text files of a folder by name, or the given ones; absolute.

    In a folder, files in capitals (README.txt, BOOKS.txt) are about the text and left out.
    """
    if isinstance(path, str | os.PathLike) and Path(path).is_dir():
        found = sorted(f for f in Path(path).iterdir() if f.is_file() and f.suffix in SUFFIXES)
        files = [f for f in found if not f.name.split(".")[0].isupper()]
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
    """A file's text, decompressed by its suffix, and the raw stream below (to tell the progress).

    Raises UserError where the text is no UTF-8 or the compressed stream is damaged.
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


def _default_cache() -> Path:
    # A relative $XDG_CACHE_HOME is to be ignored, says the XDG specification.
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "prompt_tuning_jax"


def _key(files: Sequence[Path], vocabulary: AnyVocabulary) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {vocabulary.fingerprint}".encode())
    for file in files:
        status = file.stat()
        digest.update(f"\0{file}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    return digest.hexdigest()[:20]


def _open(folder: Path) -> Corpus | None:
    """The corpus in a cache folder; None where there is none, or a damaged one."""
    try:
        tokens = np.load(folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
        starts = np.load(folder / "document_starts.npy", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    # A plain view: np.memmap's own indexing is slower.
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
                    # An empty text marks the end of a document; those of no token do not count.
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
            if _open(folder) is None:  # otherwise another process was first, with the same content
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _token_dtype(vocabulary: AnyVocabulary) -> np.dtype:
    return np.dtype("<u2" if vocabulary.size <= 2**16 else "<i4")


def _paragraph_batches(files: Sequence[Path]) -> Iterator[tuple[list[str], float]]:
    """Batches of paragraphs, an empty one before each document, and the fraction read so far."""
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
    """A flat .npy file written piece by piece: its header, of a fixed width, is written last."""

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
        # NumPy pads the header for a first axis of up to 21 digits, so that it can be rewritten.
        assert self._write_header() == self._header_size
        self._file.close()
