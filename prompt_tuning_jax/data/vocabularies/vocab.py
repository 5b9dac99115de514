"""Vocabularies: T5's SentencePiece files, ByT5's bytes, Hugging Face's tokenizers, GGUF files.

In those of T5, ids 0 and 1 are padding and end of sequence; unknown is 2, or 3 in UMT5's.  A model
may use other ids than its vocabulary (``token_ids``): an input of T5 ends with the vocabulary's
``eos_id``, as in transformers, and a target with the model's ``token_ids.eos``, at which decoding
stops.
"""

import hashlib
import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from prompt_tuning_jax.data.vocabularies.base import BaseVocabulary
from prompt_tuning_jax.data.vocabularies.class_vocabulary import ClassVocabulary
from prompt_tuning_jax.data.vocabularies.gguf_metadata import GGUF_SUFFIX
from prompt_tuning_jax.data.vocabularies.hf_tokenizer import HfTokenizer
from prompt_tuning_jax.data.vocabularies.tokenizer_files import (
    SENTENCEPIECE_BPE,
    SENTENCEPIECE_FILES,
    TOKENIZER,
    AddedTokens,
    Splitter,
    byte_extra_ids,
    ids_suffix,
    read_added_tokens,
    up_to,
    vocabulary_file,
)
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.config import TokenIds

if TYPE_CHECKING:
    import sentencepiece

PAD_ID = 0
EOS_ID = 1
T5_IDS = TokenIds()
_LARGEST = 2**27  # bytes of a SentencePiece file; the largest published ones have 5 million

DEFAULT_SENTINELS = 100
_BYTE_OFFSET = 3  # the byte b has the id b + 3
_USER_DEFINED = 4  # ModelProto.SentencePiece.Type
_NORMALIZER_SPEC = 3  # a field of ModelProto
# NormalizerSpec(add_dummy_prefix=False), merged into the file's own.
_NO_DUMMY_PREFIX = bytes([0x1A, 2, 0x18, 0])


class Vocabulary(BaseVocabulary):
    """A SentencePiece file and, above its pieces, the sentinels ``<extra_id_0>`` and so on.

    ``<extra_id_0>`` has the highest id, ``size - 1``, and the others follow downwards, as in T5.
    ``extra_ids=None`` adds as many as the tokenizer's files beside ``spiece.model`` specify,
    otherwise 100, or none if the file has them already (mT5's).  In text, a sentinel is recognized
    only at the start of a word, unless the tokenizer's files list it: tokens that they list are
    recognized everywhere (``tokenizer_files``).

    Vocabularies with the same model file and sentinels are equal, and have the same hash.  Behaves
    like ``seqio.SentencePieceVocabulary``.  Raises UserError for a file that is missing, is not a
    SentencePiece model, or has other ids than 0 and 1 for padding and end.
    """

    eos_id = EOS_ID

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        extra_ids: int | None = None,
        token_ids: TokenIds = T5_IDS,
    ) -> None:
        self.path = Path(path)
        self.token_ids = token_ids
        if extra_ids is not None and extra_ids < 0:
            raise UserError(f"extra_ids is {extra_ids}; it must be at least 0")
        model = _read_model(self.path)
        processor = _load_processor(model, path=self.path)
        self.unk_id = int(processor.unk_id())
        added = AddedTokens(by_id={})
        if self.path.name == SENTENCEPIECE_FILES[0]:
            added = read_added_tokens(self.path.parent)
            extra_ids = added.extra_ids if extra_ids is None else extra_ids
        self.sentinels_are_assumed = extra_ids is None
        if extra_ids is None:
            holds_sentinels = processor.piece_to_id(_sentinel_piece(0)) != self.unk_id
            extra_ids = 0 if holds_sentinels else DEFAULT_SENTINELS
        if extra_ids and not added.lists_sentinels:
            # Concatenated protocol buffers are merged: repeated fields are appended.
            sentinels = b"".join(
                _serialize_piece(_sentinel_piece(i)) for i in reversed(range(extra_ids))
            )
            processor = _load_processor(model + sentinels, path=self.path)
        self.extra_ids = extra_ids
        self.fingerprint = _fingerprint(model, extra_ids) + ids_suffix(token_ids)
        self._processor = processor
        self._size = len(processor)
        self._add(added, model)
        self._special = frozenset(i for i in range(len(processor)) if processor.is_control(i))

    @property
    def size(self) -> int:
        """The number of ids, sentinels included (a model's embedding may be padded beyond it)."""
        return self._size

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, without end of sequence."""
        if self._splitter is None or not self._splitter.finds_any(text):
            return list(self._processor.encode(text))
        ids: list[int] = []
        for part, is_added in self._splitter.split(text):
            if is_added:
                ids.append(self._id_of[part])
            elif ids and self._within_word is not None and not part[0].isspace():
                ids += self._within_word.encode(part)
            else:
                ids += self._processor.encode(part)
        return ids

    def encode_batch(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        """Returns ``encode`` of each text, but faster."""
        splitter = self._splitter
        if splitter is None:
            return list(self._processor.encode(list(texts), num_threads=num_threads))
        rest = [text for text in texts if not splitter.finds_any(text)]
        encoded = iter(self._processor.encode(rest, num_threads=num_threads) if rest else [])
        return [
            self.encode(text) if splitter.finds_any(text) else list(next(encoded)) for text in texts
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text before the first end of sequence.

        Ids beyond the vocabulary are unknown.
        """
        kept = [i for i in up_to(ids, self.token_ids.all_eos) if i not in self._special]
        if not self._token_of:
            return self._decode_pieces(kept)
        # Like transformers: blanks around added tokens.
        parts: list[str] = []
        for is_added, group in itertools.groupby(kept, key=self._token_of.__contains__):
            if is_added:
                parts += [self._token_of[i] for i in group]
            elif text := self._decode_pieces(list(group)).strip():
                parts.append(text)
        return " ".join(parts)

    def pieces(self, token_id: int) -> str:
        """Returns the piece of an id, with ``▁`` for a blank.

        Ids outside the vocabulary give ``<unk>``.
        """
        token_id = int(token_id)
        if token_id in self._token_of:
            return self._token_of[token_id]
        known = 0 <= token_id < len(self._processor)
        return str(self._processor.id_to_piece(token_id if known else self.unk_id))

    def sentinel(self, index: int) -> int:
        """Returns the id of ``<extra_id_{index}>``; UserError if there is none."""
        listed = self._id_of.get(_sentinel_piece(index).removeprefix("▁"))
        if listed is not None:
            return listed
        token_id = int(self._processor.piece_to_id(_sentinel_piece(index)))
        if token_id == self.unk_id:
            raise UserError(f"{self.path}: the vocabulary has no sentinel <extra_id_{index}>")
        return token_id

    @property
    def has_added_tokens(self) -> bool:
        """Whether the files beside the SentencePiece model list tokens."""
        return bool(self._id_of)

    def _add(self, added: AddedTokens, model: bytes) -> None:
        """Adds the tokens that the files beside the SentencePiece model list."""
        tokens = dict(added.by_id)
        self._size = max(self._size, 1 + max(tokens, default=0))
        for token in added.without_id:
            piece = int(self._processor.piece_to_id(token.content))
            if piece == self.unk_id:
                piece, self._size = self._size, self._size + 1
            tokens[piece] = token
        self._token_of = {token_id: token.content for token_id, token in tokens.items()}
        self._id_of = {content: token_id for token_id, content in self._token_of.items()}
        self._splitter = Splitter(tokens.values()) if tokens else None
        self._within_word: sentencepiece.SentencePieceProcessor | None = None
        if tokens and not added.legacy:
            self._within_word = _load_processor(model + _NO_DUMMY_PREFIX, path=self.path)
        if tokens:
            described = repr((sorted(tokens.items()), added.legacy)).encode()
            self.fingerprint += "-" + hashlib.sha256(described).hexdigest()[:16]

    def _decode_pieces(self, ids: list[int]) -> str:
        last = len(self._processor)
        return str(self._processor.decode([i if 0 <= i < last else self.unk_id for i in ids]))

    def __repr__(self) -> str:
        return f"Vocabulary({str(self.path)!r}, extra_ids={self.extra_ids})"


class ByteVocabulary(BaseVocabulary):
    """ByT5's vocabulary: the byte ``b`` of the text in UTF-8 has the id ``b + 3``.

    Behaves like ``seqio.ByteVocabulary``: decoding drops bytes that are not UTF-8, special ids and
    ids above the bytes.  With the default ``extra_ids`` the size is 384, that of ByT5's embedding.
    The ids above the bytes were never trained: ByT5's pre-training used the last byte ids as
    sentinels, from 258 downwards (Xue et al. 2022, section 3.1), and so does ``sentinel``.
    """

    eos_id = EOS_ID

    def __init__(self, *, extra_ids: int = 125, token_ids: TokenIds = T5_IDS) -> None:
        if extra_ids < 0:
            raise UserError(f"extra_ids is {extra_ids}; it must be at least 0")
        self.extra_ids = extra_ids
        self.token_ids = token_ids
        self.fingerprint = f"bytes-{extra_ids}" + ids_suffix(token_ids)

    @property
    def size(self) -> int:
        """The number of ids: 3 special ones, 256 bytes, and the extra ones."""
        return _BYTE_OFFSET + 256 + self.extra_ids

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, without end of sequence."""
        return [byte + _BYTE_OFFSET for byte in text.encode("utf-8")]

    def encode_batch(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        """Returns ``encode`` of each text."""
        del num_threads
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text up to the first end of sequence."""
        bytes_ = (i - _BYTE_OFFSET for i in up_to(ids, self.token_ids.all_eos))
        return bytes(b for b in bytes_ if 0 <= b < 256).decode("utf-8", errors="ignore")

    def pieces(self, token_id: int) -> str:
        """Returns a name for an id.

        It is an ASCII character, ``<0xC3>`` for other bytes, and ``<unk>`` beyond.
        """
        byte = int(token_id) - _BYTE_OFFSET
        if byte < 0:
            return {PAD_ID: "<pad>", EOS_ID: "</s>"}.get(byte + _BYTE_OFFSET, "<unk>")
        if byte >= 256:
            return "<unk>"
        return chr(byte) if 32 < byte < 127 else f"<0x{byte:02X}>"

    def sentinel(self, index: int) -> int:
        """Returns the id of sentinel ``index`` (0 to 99) in ByT5's pre-training."""
        if not 0 <= index < DEFAULT_SENTINELS:
            raise UserError(f"ByT5 has sentinels 0 to {DEFAULT_SENTINELS - 1}, not {index}")
        return _BYTE_OFFSET + 255 - index

    def __repr__(self) -> str:
        return f"ByteVocabulary(extra_ids={self.extra_ids})"


TextVocabulary: TypeAlias = Vocabulary | ByteVocabulary | HfTokenizer
AnyVocabulary: TypeAlias = TextVocabulary | ClassVocabulary


def load_vocabulary(
    path: str | os.PathLike[str],
    *,
    extra_ids: int | None = None,
    token_ids: TokenIds | None = None,
    max_size: int | None = None,
) -> TextVocabulary:
    """Returns the vocabulary at ``path``: a file, a folder with one, or ``bytes`` for ByT5's.

    A file with the suffix .gguf is a model with its tokenizer.  A file with the suffix .json is a
    ``tokenizer.json`` or the ``tokenizer_config.json`` of a ByT5; ``tokenizer.model`` is Llama's
    SentencePiece model, and any other file is one of T5's.  In a folder, ``vocabulary_file``
    chooses the file.

    Args:
      path: see above.
      extra_ids: the number of sentinels, for SentencePiece models and ByT5.
      token_ids: the model's special ids; None: those of the vocabulary.
      max_size: the number of the model's embeddings.  Tokens that are added to a tokenizer.json
        beyond them are left out: they are other models' (Gemma 3 has one for images).
    """
    if str(path) == "bytes":
        return _byte_vocabulary(extra_ids, token_ids or T5_IDS)
    file = Path(path)
    if file.is_dir():
        inside = vocabulary_file(file)
        if inside is None:
            names = (*SENTENCEPIECE_FILES, TOKENIZER, SENTENCEPIECE_BPE)
            raise UserError(f"{file}: the folder has no vocabulary ({' or '.join(names)})")
        file = inside
    if file.suffix not in (".json", GGUF_SUFFIX) and file.name != SENTENCEPIECE_BPE:
        return Vocabulary(file, extra_ids=extra_ids, token_ids=token_ids or T5_IDS)
    if file.name.endswith("config.json"):
        stored = byte_extra_ids(file)
        extra_ids = stored if extra_ids is None else extra_ids
        return _byte_vocabulary(extra_ids, token_ids or T5_IDS)
    if extra_ids is not None:
        raise UserError(f"{file} defines its sentinels: leave out extra_ids")
    return HfTokenizer(file, token_ids=token_ids, max_size=max_size)


def require_t5(vocabulary: TextVocabulary) -> None:
    """Raises UserError unless the special tokens have the ids that T5 needs."""
    if isinstance(vocabulary, HfTokenizer) and not vocabulary.is_t5:
        first = [vocabulary.pieces(i) for i in range(4)]
        raise UserError(
            f"{vocabulary.path}: T5 needs <pad> and </s> at ids 0 and 1, and <unk> at 2 or 3, but "
            f"this file begins with {', '.join(first)}: it is another model's"
        )


def _byte_vocabulary(extra_ids: int | None, token_ids: TokenIds) -> ByteVocabulary:
    if extra_ids is None:
        return ByteVocabulary(token_ids=token_ids)
    return ByteVocabulary(extra_ids=extra_ids, token_ids=token_ids)


def _read_model(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such vocabulary file; use a SentencePiece .model") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read the vocabulary: {error.strerror}") from None
    if len(data) > _LARGEST:
        raise UserError(f"{path}: more than {_LARGEST} bytes, which is too large for a vocabulary")
    return data


def _load_processor(model: bytes, *, path: Path) -> "sentencepiece.SentencePieceProcessor":
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
        ids = (processor.pad_id(), processor.eos_id())
        # A file truncated between two pieces is a valid message without a normalizer.
        if _NORMALIZER_SPEC not in _fields(model):
            raise ValueError("no normalizer")
    except (RuntimeError, ValueError, IndexError):
        raise UserError(f"{path}: not a SentencePiece model, or a damaged one") from None
    if ids != (PAD_ID, EOS_ID):
        raise UserError(
            f"{path}: T5 needs padding and end at ids 0 and 1, but they are at "
            f"{ids[0]} and {ids[1]}: the file is damaged or another model's"
        )
    return processor


def _sentinel_piece(index: int) -> str:
    return f"▁<extra_id_{index}>"


def _serialize_piece(piece: str) -> bytes:
    """Returns a ``ModelProto`` with one ``USER_DEFINED`` piece in wire format.

    Written by hand, because the generated module would require a version of protobuf.
    """
    text = piece.encode("utf-8")
    # Fields: piece = 1 (bytes), score = 2 (fixed 32 bits, 0.0), type = 3 (varint); pieces = 1.
    message = b"\x0a" + bytes([len(text)]) + text + b"\x15\0\0\0\0" + bytes([0x18, _USER_DEFINED])
    return b"\x0a" + bytes([len(message)]) + message


def _fields(message: bytes) -> set[int]:
    """Returns the field numbers of a serialized message whose fields are all messages."""
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
