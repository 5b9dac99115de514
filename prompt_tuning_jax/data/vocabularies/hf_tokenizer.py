"""Hugging Face's fast tokenizers: ``tokenizer.json``."""

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from prompt_tuning_jax.data.vocabularies.tokenizer_files import (
    ids_suffix,
    up_to,
)
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.config import TokenIds

_SPECIAL = ("<pad>", "</s>", "<unk>")  # at ids 0, 1 and 2, in T5
_EOS_ID, _UNK_ID = 1, 2
_LARGEST = 2**27  # bytes; the largest published ones have 35 million
# The library panics on patterns in the file that take too long: these texts find that early.
_PROBES = (
    "",
    *(f"{part * 40}{end}" for part in ("a", "1", " ", ".", "aB ") for end in ("!", "\0")),
)


class HfTokenizer:
    """A ``tokenizer.json`` (Hugging Face's fast tokenizers), for folders without ``spiece.model``.

    Behaves like ``vocab.Vocabulary``; unknown tokens decode as ``<unk>``.  Encoding never adds an
    end of sequence, whatever the file specifies.  Raises UserError for a file that is missing or
    damaged, or has other ids than 0, 1 and 2 for padding, end and unknown, and if the tokenizers
    library is missing.
    """

    eos_id = _EOS_ID

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        token_ids: TokenIds = TokenIds(),  # noqa: B008
    ) -> None:
        self.path = Path(path)
        self.token_ids = token_ids
        self.extra_ids = 0  # the file defines its sentinels
        try:
            with self.path.open("rb") as file:
                data = file.read(_LARGEST + 1)
            text = data.decode()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.path}: cannot read the vocabulary: {error}") from None
        if len(data) > _LARGEST:
            raise UserError(
                f"{self.path}: more than {_LARGEST} bytes, which is too large for a vocabulary"
            )
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.fingerprint += ids_suffix(token_ids)
        self._load(text)

    def _load(self, text: str) -> None:
        self._tokenizer = _parse(text, path=self.path)
        special = tuple(self._tokenizer.id_to_token(i) for i in range(len(_SPECIAL)))
        if special != _SPECIAL:
            raise UserError(
                f"{self.path}: T5 needs {', '.join(_SPECIAL)} at ids 0, 1 and 2, but this file has "
                f"{', '.join(map(str, special))}: it is another model's"
            )
        self._size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    @property
    def size(self) -> int:
        """The number of ids, sentinels included (a model's embedding may be padded beyond it)."""
        return self._size

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without end of sequence."""
        with _no_panic(self.path):
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        """``encode`` of each text, but faster; the library chooses the number of threads."""
        del num_threads
        with _no_panic(self.path):
            encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [list(one.ids) for one in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """The text before the first end of sequence; ids beyond the vocabulary are unknown."""
        kept = up_to(ids, self.token_ids.eos)
        known = [i if 0 <= i < self.size else _UNK_ID for i in kept if i not in (0, _EOS_ID)]
        with _no_panic(self.path):
            return str(self._tokenizer.decode(known, skip_special_tokens=False))

    def pieces(self, token_id: int) -> str:
        """The piece of an id, with ``▁`` for a blank; ``<unk>`` for ids outside the vocabulary."""
        token_id = int(token_id)
        piece = self._tokenizer.id_to_token(token_id) if 0 <= token_id < self.size else None
        return _SPECIAL[_UNK_ID] if piece is None else str(piece)

    def sentinel(self, index: int) -> int:
        """The id of ``<extra_id_{index}>``; UserError if there is none."""
        for piece in (f"<extra_id_{index}>", f"▁<extra_id_{index}>"):
            token_id = self._tokenizer.token_to_id(piece)
            if token_id is not None:
                return int(token_id)
        raise UserError(f"{self.path}: the vocabulary has no sentinel <extra_id_{index}>")

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_tokenizer": self._tokenizer.to_str()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._load(state["_tokenizer"])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HfTokenizer) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"HfTokenizer({str(self.path)!r})"


def _parse(text: str, *, path: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UserError(
            f"{path} is a Hugging Face fast tokenizer: install tokenizers (pip install "
            "tokenizers), or put the model's spiece.model beside it"
        ) from None
    with _no_panic(path), _quiet_errors():
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        for probe in _PROBES:
            tokenizer.encode(probe, add_special_tokens=False)
    return tokenizer


@contextlib.contextmanager
def _no_panic(path: Path) -> Iterator[None]:
    """Turns the library's failures into UserError: Exception, or a panic, which is not one."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        line = next(iter(str(error).splitlines()), "")[:200]
        raise UserError(f"{path}: not a tokenizer, or a damaged one: {line}") from None


@contextlib.contextmanager
def _quiet_errors() -> Iterator[None]:
    """Suppresses the stack trace of a panic, which the library writes to the process's stderr."""
    sys.stderr.flush()
    try:
        saved = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
