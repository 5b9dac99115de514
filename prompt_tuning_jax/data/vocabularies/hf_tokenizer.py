"""Hugging Face's fast tokenizers: ``tokenizer.json``, and the same built from other files."""

import os
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from prompt_tuning_jax.data.vocabularies.base import BaseVocabulary
from prompt_tuning_jax.data.vocabularies.chat_encoder import ChatEncoder
from prompt_tuning_jax.data.vocabularies.chat_template import ChatFormat, render_chat
from prompt_tuning_jax.data.vocabularies.gguf_metadata import GGUF_SUFFIX
from prompt_tuning_jax.data.vocabularies.gguf_tokenizer import gguf_spec
from prompt_tuning_jax.data.vocabularies.plain_text import PlainEncoder
from prompt_tuning_jax.data.vocabularies.sentencepiece_bpe import sentencepiece_spec
from prompt_tuning_jax.data.vocabularies.tokenizer_files import (
    BPE_VOCABULARY,
    SENTENCEPIECE_BPE,
    AddedToken,
    ids_suffix,
    up_to,
)
from prompt_tuning_jax.data.vocabularies.tokenizer_json import (
    bpe_spec,
    json_spec,
    parse_tokenizer,
    post_processor,
    tokenizer_as_json,
)
from prompt_tuning_jax.data.vocabularies.tokenizer_spec import no_panic
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.config import TokenIds

_PAD, _BOS, _EOS, _UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"  # of T5's vocabularies
_T5_EOS = 1


class HfTokenizer(BaseVocabulary):
    """A tokenizer of Hugging Face's library: a ``tokenizer.json``, or one built from other files.

    These are a GGUF file, Llama's ``tokenizer.model``, or a ``vocab.json`` with a ``merges.txt``
    beside it.  The tokenizer's
    other files in the folder say which tokens are special.  An input starts with the
    beginning of sequence if the tokenizer adds one.  ``token_ids`` defaults to T5's in T5's
    vocabularies, which have padding and end at ids 0 and 1, and unknown at 2 or 3 (``is_t5``), and
    otherwise to those of a decoder-only model with the special tokens of the files.

    ``encode`` recognizes special tokens in texts, as transformers does; ``encode_chat`` does not.
    ``decode`` leaves special tokens out; in T5's vocabularies, it keeps sentinels and ``<unk>``.

    Raises UserError for a file that is missing or damaged, for a tokenizer without an end of
    sequence, and if the tokenizers library is missing.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        token_ids: TokenIds | None = None,
        max_size: int | None = None,
    ) -> None:
        self.path = Path(path)
        if self.path.suffix == GGUF_SUFFIX:
            spec = gguf_spec(self.path)
        elif self.path.name == BPE_VOCABULARY:
            spec = bpe_spec(self.path)
        elif self.path.name == SENTENCEPIECE_BPE:
            spec = sentencepiece_spec(self.path)
        else:
            spec = json_spec(self.path, max_size=max_size)
        self._tokenizer = spec.tokenizer
        self._special = dict(spec.special)
        self._chat_template = spec.chat_template
        self._measure()
        first = [self._tokenizer.id_to_token(i) for i in range(4)]
        self.is_t5 = first[:2] == [_PAD, _EOS] and _UNKNOWN in first
        self.token_ids, self.eos_id = self._ids(token_ids or spec.token_ids)
        self.input_start = self._input_start(spec.add_bos)
        self.fingerprint = spec.digest + ids_suffix(self.token_ids)

    def _measure(self) -> None:
        """Sets what decoding needs from the tokenizer."""
        self._size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        # Ids of pieces that are a single byte, in tokenizers that write other text in pieces.
        self._byte_of: dict[int, int] = {}
        decoder = self._tokenizer.decoder
        kinds = "" if decoder is None else decoder.__getstate__().decode(errors="replace")
        self._is_byte_level = '"ByteLevel"' in kinds
        if '"ByteFallback"' in kinds:
            for byte in range(256):
                token_id = self._tokenizer.token_to_id(f"<0x{byte:02X}>")
                if token_id is not None:
                    self._byte_of[token_id] = byte

    def _ids(self, given: TokenIds | None) -> tuple[TokenIds, int]:
        """Returns the model's special ids, and the vocabulary's end of sequence."""
        if self.is_t5:
            return given or TokenIds(), _T5_EOS
        eos = self._special_id("eos_token")
        if given is None:
            if eos is None:
                raise UserError(
                    f"{self.path}: the tokenizer has no end-of-sequence token; name it as "
                    "eos_token in tokenizer_config.json"
                )
            pad = self._special_id("pad_token")
            given = TokenIds(pad=eos if pad is None else pad, eos=eos, start=-1)
        if not 0 <= given.eos < self._size:
            known = "" if eos is None else f"; the tokenizer's is {eos} ({self.pieces(eos)})"
            raise UserError(
                f"{self.path}: the model's end-of-sequence id (eos_token_id) is {given.eos}, and "
                f"the vocabulary has ids 0 to {self._size - 1}{known}"
            )
        return given, given.eos if eos is None else eos

    def _special_id(self, name: str) -> int | None:
        text = self._special.get(name)
        return None if text is None else self._tokenizer.token_to_id(text)

    def _input_start(self, add_bos: bool | None) -> tuple[int, ...]:
        if add_bos is False:
            return ()
        if add_bos:
            bos = self._special_id("bos_token")
            if bos is None:
                raise UserError(
                    f"{self.path}: add_bos_token is true, but the tokenizer has no bos_token "
                    f"({self._special.get('bos_token')!r})"
                )
            return (bos,)
        with no_panic(self.path):
            one = self._tokenizer.encode("a", add_special_tokens=True)
        start = next((i for i, mask in enumerate(one.special_tokens_mask) if not mask), 0)
        return tuple(one.ids[:start])

    @property
    def size(self) -> int:
        """The number of ids, sentinels included (a model's embedding may be padded beyond it)."""
        return self._size

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text alone, without beginning and end of sequence."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        """Returns ``encode`` of each text, but faster.

        The library chooses the number of threads.
        """
        del num_threads
        with no_panic(self.path):
            encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        rows = [list(one.ids) for one in encoded]
        fill = self.token_ids.fill
        if fill >= 0 and any(fill in ids for ids in rows):
            # The padding token, written out in a text, is text.
            rows = [
                self._plain.encode([text], at_start=True)[0] if fill in ids else ids
                for text, ids in zip(texts, rows, strict=True)
            ]
        return rows

    def encode_chat(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        """Returns the token ids of each text as a user's message.

        They end where the answer begins.

        Special tokens of the template are tokens; written out in a text, they are text.
        """
        del num_threads
        return self._chat.encode(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text before the first end of sequence.

        Ids beyond the vocabulary are unknown.
        """
        kept = up_to(ids, self.token_ids.all_eos)
        if self.is_t5:
            unknown, *left_out = map(self._tokenizer.token_to_id, (_UNKNOWN, _PAD, _BOS, _EOS))
            kept = [i if 0 <= i < self._size else unknown for i in kept if i not in left_out]
        else:
            kept = [i for i in kept if 0 <= i < self._size and i not in self._special_ids]
        incomplete = self._incomplete(kept)
        with no_panic(self.path):
            text = self._tokenizer.decode(kept[: len(kept) - incomplete], skip_special_tokens=False)
        return str(text) + "\ufffd" * (incomplete > 0)

    def _incomplete(self, ids: Sequence[int]) -> int:
        """Returns the number of last ids that are the first bytes of a character.

        The library would replace all bytes beside an incomplete character as well.
        """
        for count in range(1, min(4, len(ids) + 1)):
            byte = self._byte_of.get(ids[-count])
            if byte is None or byte < 0x80:
                return 0
            if byte >= 0xC0:  # begins a character
                length = 2 + (byte >= 0xE0) + (byte >= 0xF0)
                return count if count < length else 0
        return 0

    def pieces(self, token_id: int) -> str:
        """Returns the piece of an id, with ``▁`` for a blank.

        Ids outside the vocabulary give ``<unk>``.
        """
        token_id = int(token_id)
        piece = self._tokenizer.id_to_token(token_id) if 0 <= token_id < self.size else None
        if piece is None:
            return _UNKNOWN
        if self._is_byte_level and token_id not in self._special_ids:
            piece = _text_of_bytes(piece)
        return str(piece).replace(" ", "▁")

    def sentinel(self, index: int) -> int:
        """Returns the id of ``<extra_id_{index}>``; UserError if there is none."""
        for piece in (f"<extra_id_{index}>", f"▁<extra_id_{index}>"):
            token_id = self._tokenizer.token_to_id(piece)
            if token_id is not None:
                return int(token_id)
        raise UserError(f"{self.path}: the vocabulary has no sentinel <extra_id_{index}>")

    def as_json(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the contents of ``tokenizer.json`` and ``tokenizer_config.json``."""
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self._special}
        config["add_bos_token"] = bool(self.input_start)
        if self._chat_template:
            config["chat_template"] = self._chat_template
        content = tokenizer_as_json(self._tokenizer, path=self.path)
        if self._input_start(None) != self.input_start:  # the files beside the tokenizer decide
            first = {str(self._tokenizer.id_to_token(i)): i for i in self.input_start}
            content["post_processor"] = post_processor(first)
        return content, config

    @cached_property
    def _plain(self) -> PlainEncoder:
        special = {i: str(self._tokenizer.id_to_token(i)) for i in self._special_ids}
        return PlainEncoder(self._tokenizer, special, path=self.path)

    @cached_property
    def _chat(self) -> ChatEncoder:
        added = self._tokenizer.get_added_tokens_decoder()
        special = {
            i: AddedToken(
                content=token.content,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                single_word=token.single_word,
            )
            for i, token in added.items()
            if token.special
        }
        return ChatEncoder(self.chat_format, self._plain, special)

    @cached_property
    def chat_format(self) -> ChatFormat:
        """What the chat template puts around a message; UserError if there is none."""
        if not self._chat_template:
            raise UserError(
                f"{self.path}: data.chat is True, but this model has no chat template; set it to "
                "False, or use an instruction-tuned model"
            )
        special = tuple(sorted(self._special.items()))
        return render_chat(self._chat_template, special, of=str(self.path))

    def _num_chat_end(self) -> int:
        return self._chat.num_last

    def _chat_format(self) -> str:
        return repr(self.chat_format)

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name not in _COMPUTED}
        return {**state, "_tokenizer": self._tokenizer.to_str()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._tokenizer = parse_tokenizer(state["_tokenizer"], path=self.path)

    def __repr__(self) -> str:
        return f"HfTokenizer({str(self.path)!r})"


# Attributes that a copy computes again.
_COMPUTED = ("_tokenizer", "_plain", "_chat")


def _text_of_bytes(piece: str) -> str:
    """Returns the text of a byte-level piece; bytes that are no text are written ``<0xC3>``."""
    bytes_of = _bytes_of_characters()
    if not all(character in bytes_of for character in piece):
        return piece
    raw = bytes(bytes_of[character] for character in piece)
    return raw.decode("utf-8", errors="backslashreplace") if raw else piece


@lru_cache(maxsize=1)
def _bytes_of_characters() -> dict[str, int]:
    """Returns GPT-2's characters for bytes.

    Printable ones are themselves, and others follow from U+0100.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }
