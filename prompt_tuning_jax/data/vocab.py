"""Text to token ids and back: T5's SentencePiece vocabularies, ByT5's bytes, Hugging Face's files.

Ids 0, 1 and 2 are padding, end of sequence and unknown, in all.  Encoding adds no end of sequence.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from prompt_tuning_jax.data.hf_tokenizer import (
    SENTENCEPIECE_FILES,
    HfTokenizer,
    byte_extra_ids,
    vocabulary_file,
)
from prompt_tuning_jax.errors import UserError

if TYPE_CHECKING:
    import sentencepiece

PAD_ID = 0
EOS_ID = 1
UNK_ID = 2

DEFAULT_SENTINELS = 100
_BYTE_OFFSET = 3  # the byte b has the id b + 3
_USER_DEFINED = 4  # ModelProto.SentencePiece.Type
_NORMALIZER_SPEC = 3  # a field of ModelProto


class Vocabulary:
    """A SentencePiece file and, above its pieces, the sentinels ``<extra_id_0>`` and so on.

    ``<extra_id_0>`` has the highest id, ``size - 1``, and the others follow downwards, as in T5.
    Where ``extra_ids`` is None there are 100, or none are added to a file that holds them (mT5's).
    In text, a sentinel is recognised at the start of a word only.

    Equal and of equal hash where model file and sentinels are.  Behaves as
    ``seqio.SentencePieceVocabulary``.  Raises UserError for a file that is missing, is no
    SentencePiece model, or numbers padding, end and unknown otherwise than 0, 1 and 2.
    """

    def __init__(self, path: str | os.PathLike[str], *, extra_ids: int | None = None) -> None:
        self.path = Path(path)
        if extra_ids is not None and extra_ids < 0:
            raise UserError(f"extra_ids must be 0 or more, not {extra_ids}")
        model = _read_model(self.path)
        processor = _load_processor(model, path=self.path)
        if extra_ids is None:
            holds_sentinels = processor.piece_to_id(_sentinel_piece(0)) != UNK_ID
            extra_ids = 0 if holds_sentinels else DEFAULT_SENTINELS
        if extra_ids:
            # Messages of protocol buffers that are concatenated merge, and repeated fields grow.
            added = b"".join(
                _serialize_piece(_sentinel_piece(i)) for i in reversed(range(extra_ids))
            )
            processor = _load_processor(model + added, path=self.path)
        self.extra_ids = extra_ids
        self.fingerprint = _fingerprint(model, extra_ids)
        self._processor = processor
        self._special = frozenset(i for i in range(len(processor)) if processor.is_control(i))

    @property
    def size(self) -> int:
        """The number of ids, sentinels included (a model's embedding may be padded beyond it)."""
        return len(self._processor)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without end of sequence."""
        return list(self._processor.encode(text))

    def encode_batch(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        """The same as ``encode`` of each, faster."""
        return list(self._processor.encode(list(texts), num_threads=num_threads))

    def decode(self, ids: Iterable[int]) -> str:
        """The text up to the first end of sequence; ids outside the vocabulary read as unknown."""
        kept = (i if 0 <= i < self.size else UNK_ID for i in _up_to_eos(ids))
        return str(self._processor.decode([i for i in kept if i not in self._special]))

    def pieces(self, token_id: int) -> str:
        """The piece that an id stands for, with ``▁`` for a blank; ``<unk>`` beyond the size."""
        token_id = int(token_id)
        return str(self._processor.id_to_piece(token_id if 0 <= token_id < self.size else UNK_ID))

    def sentinel(self, index: int) -> int:
        """The id of ``<extra_id_{index}>``; UserError where there is none."""
        token_id = int(self._processor.piece_to_id(_sentinel_piece(index)))
        if token_id == UNK_ID:
            raise UserError(f"{self.path}: the vocabulary has no sentinel <extra_id_{index}>")
        return token_id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"Vocabulary({str(self.path)!r}, extra_ids={self.extra_ids})"


class ByteVocabulary:
    """ByT5's vocabulary: the byte ``b`` of the text in UTF-8 has the id ``b + 3``.

    Behaves as ``seqio.ByteVocabulary``: bytes that are not UTF-8, special ids and ids above the
    bytes vanish in decoding.  The default ``extra_ids`` makes the size 384, that of ByT5's
    embedding.  The ids above the bytes were never trained, though: ByT5's pre-training used the
    last byte ids as sentinels, 258 downwards (Xue et al. 2022, section 3.1); so does ``sentinel``.
    """

    def __init__(self, *, extra_ids: int = 125) -> None:
        if extra_ids < 0:
            raise UserError(f"extra_ids must be 0 or more, not {extra_ids}")
        self.extra_ids = extra_ids
        self.fingerprint = f"bytes-{extra_ids}"

    @property
    def size(self) -> int:
        """The number of ids: 3 special ones, 256 bytes, and the extra ones."""
        return _BYTE_OFFSET + 256 + self.extra_ids

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without end of sequence."""
        return [byte + _BYTE_OFFSET for byte in text.encode("utf-8")]

    def encode_batch(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        """The same as ``encode`` of each."""
        del num_threads
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text up to the first end of sequence."""
        bytes_ = (i - _BYTE_OFFSET for i in _up_to_eos(ids))
        return bytes(b for b in bytes_ if 0 <= b < 256).decode("utf-8", errors="ignore")

    def pieces(self, token_id: int) -> str:
        """A name for an id: an ASCII character, ``<0xC3>`` for other bytes, ``<unk>`` beyond."""
        byte = int(token_id) - _BYTE_OFFSET
        if byte < 0:
            return {PAD_ID: "<pad>", EOS_ID: "</s>"}.get(byte + _BYTE_OFFSET, "<unk>")
        if byte >= 256:
            return "<unk>"
        return chr(byte) if 32 < byte < 127 else f"<0x{byte:02X}>"

    def sentinel(self, index: int) -> int:
        """The id that stood for sentinel ``index`` (0 to 99) in ByT5's pre-training."""
        if not 0 <= index < DEFAULT_SENTINELS:
            raise UserError(f"ByT5 has sentinels 0 to {DEFAULT_SENTINELS - 1}, not {index}")
        return _BYTE_OFFSET + 255 - index

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByteVocabulary) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"ByteVocabulary(extra_ids={self.extra_ids})"


AnyVocabulary: TypeAlias = Vocabulary | ByteVocabulary | HfTokenizer


def load_vocabulary(path: str | os.PathLike[str], *, extra_ids: int | None = None) -> AnyVocabulary:
    """The vocabulary at ``path``: a file, a folder with one, or ``bytes`` for ByT5's.

    A file is a SentencePiece model, or by its suffix .json a ``tokenizer.json`` or the
    ``tokenizer_config.json`` of ByT5; in a folder, ``vocabulary_file`` finds it.
    """
    if str(path) == "bytes":
        return _byte_vocabulary(extra_ids)
    file = Path(path)
    if file.is_dir():
        found = vocabulary_file(file)
        if found is None:
            names = (*SENTENCEPIECE_FILES, "tokenizer.json")
            raise UserError(f"{file}: the folder holds no vocabulary ({' or '.join(names)})")
        file = found
    if file.suffix != ".json":
        return Vocabulary(file, extra_ids=extra_ids)
    if file.name.endswith("config.json"):
        stored = byte_extra_ids(file)
        return _byte_vocabulary(stored if extra_ids is None else extra_ids)
    if extra_ids is not None:
        raise UserError(f"{file} has the sentinels that it has: leave out extra_ids")
    return HfTokenizer(file)


def _byte_vocabulary(extra_ids: int | None) -> ByteVocabulary:
    return ByteVocabulary() if extra_ids is None else ByteVocabulary(extra_ids=extra_ids)


def _read_model(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such vocabulary file; give a SentencePiece .model") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read the vocabulary: {error.strerror}") from None


def _load_processor(model: bytes, *, path: Path) -> "sentencepiece.SentencePieceProcessor":
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
        ids = (processor.pad_id(), processor.eos_id(), processor.unk_id())
        # A file cut between two pieces is a valid message, of fewer pieces that are not normalised.
        if _NORMALIZER_SPEC not in _fields(model):
            raise ValueError("no normalizer")
    except (RuntimeError, ValueError, IndexError):
        raise UserError(f"{path}: not a SentencePiece model, or a damaged one") from None
    if ids != (PAD_ID, EOS_ID, UNK_ID):
        raise UserError(
            f"{path}: T5 needs padding, end and unknown at ids 0, 1 and 2; this file is damaged "
            f"or another model's, they are at {', '.join(map(str, ids))}"
        )
    return processor


def _sentinel_piece(index: int) -> str:
    return f"▁<extra_id_{index}>"


def _serialize_piece(piece: str) -> bytes:
    """``ModelProto(pieces=[SentencePiece(piece=piece, type=USER_DEFINED)])`` on the wire.

    By hand, because the generated module would tie us to a version of protobuf for two fields.
    """
    text = piece.encode("utf-8")
    # Fields: piece = 1 (bytes), score = 2 (fixed 32 bits, 0.0), type = 3 (varint); pieces = 1.
    message = b"\x0a" + bytes([len(text)]) + text + b"\x15\0\0\0\0" + bytes([0x18, _USER_DEFINED])
    return b"\x0a" + bytes([len(message)]) + message


def _fields(message: bytes) -> set[int]:
    """The field numbers in a serialised message all of whose fields are messages."""
    fields = set()
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        length, position = _varint(message, position)
        fields.add(tag >> 3)
        position += length
    return fields


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while message[position] & 0x80:
        value |= (message[position] & 0x7F) << shift
        position, shift = position + 1, shift + 7
    return value | message[position] << shift, position + 1


def _fingerprint(model: bytes, extra_ids: int) -> str:
    return hashlib.sha256(model + f"\0{extra_ids}".encode()).hexdigest()[:16]


def _up_to_eos(ids: Iterable[int]) -> list[int]:
    kept = [int(i) for i in ids]
    return kept[: kept.index(EOS_ID)] if EOS_ID in kept else kept
