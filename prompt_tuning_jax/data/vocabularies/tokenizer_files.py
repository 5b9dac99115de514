"""The tokenizer's files in a model's folder, which define the vocabulary and the added tokens.

Added tokens are separate units of a text.  They are split off before the SentencePiece model
encodes the text between them, as in transformers' Python tokenizers
(``PreTrainedTokenizer.tokenize``, version 4).
"""

import itertools
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.config import TokenIds
from prompt_tuning_jax.untrusted_input import json_type, read_json_file

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
CHAT_TEMPLATE = "chat_template.jinja"
FILES = (TOKENIZER_CONFIG, SPECIAL_TOKENS, ADDED_TOKENS)
SENTENCEPIECE_FILES = ("spiece.model", "sentencepiece.model")  # Hugging Face's and T5X's names
SENTENCEPIECE_BPE = "tokenizer.model"  # of Llama and its like
TOKENIZER = "tokenizer.json"
BPE_VOCABULARY, BPE_MERGES = "vocab.json", "merges.txt"  # of tokenizers without a tokenizer.json
# Files that are fetched with a model.
TOKENIZER_FILES = (
    *("spiece.model", TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS, ADDED_TOKENS, CHAT_TEMPLATE),
    *(BPE_VOCABULARY, BPE_MERGES, SENTENCEPIECE_BPE),
)
_MODEL_CONFIG = "config.json"
_BYTE_TOKENIZER = "ByT5Tokenizer"


_SPECIAL = ("<pad>", "</s>", "<unk>")  # never recognized in text
_SENTINEL = re.compile(r"<extra_id_(\d{1,6})>")
_SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
_LARGEST_ID = 2**24
_LARGEST_TEMPLATE = 2**20  # bytes
_FLAGS = ("lstrip", "rstrip", "single_word")


@dataclass(frozen=True, kw_only=True)
class AddedToken:
    """A token: ``lstrip`` and ``rstrip`` strip blanks beside it; ``single_word``: not in words."""

    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True, kw_only=True)
class AddedTokens:
    """The tokens that a folder's files add to the SentencePiece model.

    ``by_id`` are tokens with an id; tokens ``without_id`` get the next free ids; ``extra_ids`` is
    the number of sentinels, or None if no file specifies it.  With ``legacy``, text after an added
    token begins a word even without a blank.
    """

    by_id: Mapping[int, AddedToken]
    without_id: tuple[AddedToken, ...] = ()
    extra_ids: int | None = None
    legacy: bool = True

    @property
    def lists_sentinels(self) -> bool:
        """Whether the sentinels are among the tokens with an id."""
        return any(_SENTINEL.fullmatch(token.content) for token in self.by_id.values())


def read_added_tokens(folder: Path, *, without: Container[str] = _SPECIAL) -> AddedTokens:
    """Returns the tokens that the tokenizer's files in ``folder`` add; UserError for invalid files.

    ``without`` are texts that are left out: those that T5's vocabularies have anyway.
    As in transformers, ``added_tokens_decoder`` of tokenizer_config.json replaces
    added_tokens.json, whose tokens have the flags of special_tokens_map.json.
    """
    config = _read_object(folder / TOKENIZER_CONFIG)
    special = _special_tokens(folder, config)
    by_id: dict[int, AddedToken] = {}
    where = folder / TOKENIZER_CONFIG
    decoder = config.get("added_tokens_decoder")
    if decoder is not None:
        if not isinstance(decoder, dict):
            raise UserError(f"{where}: added_tokens_decoder is not an object of tokens by id")
        for key, value in decoder.items():
            token_id = int(key) if re.fullmatch(r"\d{1,9}", key) else key
            by_id[_checked_id(token_id, where=where)] = _token(value, where=where)
    else:
        where = folder / ADDED_TOKENS
        for content, token_id in _read_object(where).items():
            token = special.get(content) or _token(content, where=where)
            by_id[_checked_id(token_id, where=where)] = token
    by_id = {token_id: token for token_id, token in by_id.items() if token.content not in without}
    contents = [token.content for token in by_id.values()]
    ((twice, count),) = Counter(contents).most_common(1) or [("", 1)]
    if count > 1:
        raise UserError(f"{where}: the token {twice!r} has two ids")
    sentinels = [content for content in (*contents, *special) if _SENTINEL.fullmatch(content)]
    rest = [
        token
        for content, token in special.items()
        if content not in {*contents, *_SPECIAL} and not _SENTINEL.fullmatch(content)
    ]
    extra_ids = _extra_ids(config, where=folder / TOKENIZER_CONFIG)
    if extra_ids is None and sentinels:
        extra_ids = len(set(sentinels))
    return AddedTokens(
        by_id=by_id,
        without_id=tuple(rest),
        extra_ids=extra_ids,
        legacy=config.get("legacy") is not False,
    )


class Splitter:
    """Splits texts at added tokens."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self._tokens = {token.content: token for token in tokens}
        # The longest match first; alternatives of plain text cannot backtrack much.
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)))

    def finds_any(self, text: str) -> bool:
        """Returns whether the text contains one of the tokens."""
        return self._pattern.search(text) is not None

    def split(self, text: str) -> Iterator[tuple[str, bool]]:
        """Yields the parts of a text, in order, and whether each is an added token."""
        parts: list[str] = []
        at = 0
        for match in self._pattern.finditer(text):
            parts += [text[at : match.start()], match[0]]
            at = match.end()
        parts.append(text[at:])
        parts = [part for part in parts if part]
        for number, part in enumerate(parts):
            token = self._tokens.get(part)
            if token is None:
                continue
            before = parts[number - 1] if number else ""
            after = parts[number + 1] if number + 1 < len(parts) else ""
            if token.rstrip and after:
                parts[number + 1] = after = after.lstrip()
            if token.lstrip and before:
                parts[number - 1] = before = before.rstrip()
            if token.single_word and before and before[-1] != " ":
                parts[number - 1], parts[number] = before + part, ""
            elif token.single_word and after and after[0] != " ":
                parts[number + 1], parts[number] = part + after, ""
        for part in parts:
            if part:
                yield part, part in self._tokens


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, AddedToken]:
    tokens: dict[str, AddedToken] = {}
    files = ((SPECIAL_TOKENS, _read_object(folder / SPECIAL_TOKENS)), (TOKENIZER_CONFIG, config))
    for name, value in files:
        where = folder / name
        listed = value.get("additional_special_tokens") or []
        if not isinstance(listed, list):
            raise UserError(f"{where}: additional_special_tokens is not a list")
        for one in listed:
            token = _token(one, where=where)
            tokens.setdefault(token.content, token)
    return tokens


def _token(value: Any, *, where: Path) -> AddedToken:
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or not content:
        raise UserError(f"{where}: an added token is {str(value)[:80]!r}, which has no text")
    flags = {name: value.get(name, False) for name in _FLAGS} if isinstance(value, dict) else {}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise UserError(f"{where}: a flag of the token {content[:80]!r} must be true or false")
    return AddedToken(content=content, **flags)


def _checked_id(value: Any, *, where: Path) -> int:
    if type(value) is not int or not 0 <= value < _LARGEST_ID:
        raise UserError(f"{where}: {str(value)[:80]!r} is not a valid token id")
    return value


def _extra_ids(config: Mapping[str, Any], *, where: Path) -> int | None:
    value = config.get("extra_ids")
    if value is not None and (type(value) is not int or not 0 <= value <= 100_000):
        raise UserError(
            f"{where}: extra_ids is {str(value)[:80]!r}; it must be an integer of at least 0"
        )
    return value


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value = read_json_file(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} is {json_type(value)}, not a JSON object")
    return value


def vocabulary_file(folder: Path) -> Path | None:
    """Returns the file in a model's folder that defines its vocabulary, or None.

    In this order: the ``tokenizer_config.json`` of a ByT5, which has no other file; a SentencePiece
    model of T5's; ``tokenizer.json``; Llama's ``tokenizer.model``; ``vocab.json`` with
    ``merges.txt``; and a ``config.json`` that names ByT5's tokenizer.
    """
    if _is_of_bytes(folder / TOKENIZER_CONFIG):
        return folder / TOKENIZER_CONFIG
    for name in (*SENTENCEPIECE_FILES, TOKENIZER, SENTENCEPIECE_BPE):
        if (folder / name).is_file():
            return folder / name
    if all((folder / name).is_file() for name in (BPE_VOCABULARY, BPE_MERGES)):
        return folder / BPE_VOCABULARY
    return folder / _MODEL_CONFIG if _is_of_bytes(folder / _MODEL_CONFIG) else None


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """What tokenizer_config.json and the files beside it say about a tokenizer.json.

    Attributes:
      special: the texts of ``bos_token``, ``eos_token``, ``pad_token`` and ``unk_token``, as far as
        they are known.
      add_bos: whether an input starts with ``bos_token``; None if no file says so.
      chat_template: in Jinja; empty if there is none.
    """

    special: Mapping[str, str]
    add_bos: bool | None
    chat_template: str


def read_tokenizer_config(folder: Path) -> TokenizerConfig:
    """Reads the files beside a tokenizer.json; UserError for invalid ones.

    As in transformers, tokenizer_config.json takes precedence over special_tokens_map.json, and
    chat_template.jinja over the template in tokenizer_config.json.
    """
    where = folder / TOKENIZER_CONFIG
    config = _read_object(where)
    special: dict[str, str] = {}
    for path, value in (
        (folder / SPECIAL_TOKENS, _read_object(folder / SPECIAL_TOKENS)),
        (where, config),
    ):
        for name in _SPECIAL_NAMES:
            if value.get(name) is not None:
                special[name] = _token(value[name], where=path).content
    add_bos = config.get("add_bos_token")
    if add_bos is not None and not isinstance(add_bos, bool):
        raise UserError(f"{where}: add_bos_token is {add_bos!r}; it must be true or false")
    return TokenizerConfig(
        special=special, add_bos=add_bos, chat_template=_chat_template(folder, config)
    )


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str:
    file = folder / CHAT_TEMPLATE
    if file.is_file():
        try:
            with file.open("rb") as stream:
                return stream.read(_LARGEST_TEMPLATE).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: cannot read the chat template: {error}") from None
    template = config.get("chat_template")
    if isinstance(template, list):  # several, with names
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{folder / TOKENIZER_CONFIG}: chat_template is not a text")
    return template or ""


def up_to(ids: Iterable[int], ends: Container[int]) -> list[int]:
    """Returns the ids before the first end of sequence."""
    return list(itertools.takewhile(lambda i: i not in ends, map(int, ids)))


def ids_suffix(token_ids: TokenIds) -> str:
    """Returns the part of a vocabulary's fingerprint for the model's token ids; empty for T5's."""
    if token_ids == TokenIds():
        return ""
    suffix = "-".join(map(str, ("", token_ids.pad, *token_ids.all_eos, token_ids.start)))
    return suffix if token_ids.inputs_have_eos else f"{suffix}-no-eos"


def byte_extra_ids(path: Path) -> int | None:
    """Returns the number of ids above the bytes in a ByT5's configuration.

    Returns None if not specified.
    """
    if not _is_of_bytes(path):
        raise UserError(
            f"{path}: no vocabulary; use {TOKENIZER}, a SentencePiece .model, or the "
            f"configuration of a {_BYTE_TOKENIZER}"
        )
    extra_ids = _read_object(path).get("extra_ids")
    if extra_ids is not None and (type(extra_ids) is not int or extra_ids < 0):
        raise UserError(f"{path}: extra_ids is {extra_ids!r}; it must be an integer of at least 0")
    return extra_ids


def _is_of_bytes(path: Path) -> bool:
    return _read_object(path).get("tokenizer_class") == _BYTE_TOKENIZER
