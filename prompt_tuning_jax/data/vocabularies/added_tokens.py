"""Tokens that a Hugging Face folder adds to a SentencePiece vocabulary, and their ids.

They are units of their own in a text: split off before the SentencePiece model sees what is between
them, as transformers' tokenizers of Python do (``PreTrainedTokenizer.tokenize``, version 4).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.untrusted_input import json_type, read_json_file

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
FILES = (TOKENIZER_CONFIG, SPECIAL_TOKENS, ADDED_TOKENS)

_T5S_OWN = ("<pad>", "</s>", "<unk>")  # no text writes these
_SENTINEL = re.compile(r"<extra_id_(\d{1,6})>")
_LARGEST_ID = 2**24
_FLAGS = ("lstrip", "rstrip", "single_word")


@dataclass(frozen=True, kw_only=True)
class AddedToken:
    """``lstrip`` and ``rstrip``: it takes the blanks beside it; ``single_word``: not in a word."""

    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True, kw_only=True)
class AddedTokens:
    """What the files of a folder say about the tokens beside the SentencePiece model.

    ``by_id`` are those that have an id; ``without_id`` get the next free ones; ``extra_ids`` is the
    number of sentinels, or None where no file says it.  With ``legacy`` what follows an added token
    begins a word, blank or not.
    """

    by_id: Mapping[int, AddedToken]
    without_id: tuple[AddedToken, ...] = ()
    extra_ids: int | None = None
    legacy: bool = True

    @property
    def lists_sentinels(self) -> bool:
        """Whether the sentinels are among those with an id."""
        return any(_SENTINEL.fullmatch(token.content) for token in self.by_id.values())


def read_added_tokens(folder: Path) -> AddedTokens:
    """What the tokenizer's files in ``folder``, as far as they exist, add; UserError for nonsense.

    As in transformers, ``added_tokens_decoder`` of tokenizer_config.json takes the place of
    added_tokens.json, whose tokens have the flags of special_tokens_map.json.
    """
    config = _read_object(folder / TOKENIZER_CONFIG)
    special = _special_tokens(folder, config)
    by_id: dict[int, AddedToken] = {}
    where = folder / TOKENIZER_CONFIG
    decoder = config.get("added_tokens_decoder")
    if decoder is not None:
        if not isinstance(decoder, dict):
            raise UserError(f"{where}: added_tokens_decoder is no object of tokens by id")
        for key, value in decoder.items():
            token_id = int(key) if re.fullmatch(r"\d{1,9}", key) else key
            by_id[_checked_id(token_id, where=where)] = _token(value, where=where)
    else:
        where = folder / ADDED_TOKENS
        for content, token_id in _read_object(where).items():
            token = special.get(content) or _token(content, where=where)
            by_id[_checked_id(token_id, where=where)] = token
    by_id = {token_id: token for token_id, token in by_id.items() if token.content not in _T5S_OWN}
    contents = [token.content for token in by_id.values()]
    if len(set(contents)) < len(contents):
        twice = next(content for content in contents if contents.count(content) > 1)
        raise UserError(f"{where}: the token {twice!r} has two ids")
    sentinels = [content for content in (*contents, *special) if _SENTINEL.fullmatch(content)]
    rest = [
        token
        for content, token in special.items()
        if content not in {*contents, *_T5S_OWN} and not _SENTINEL.fullmatch(content)
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
        # At each place the longest; alternatives of plain text cannot take long.
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)))

    def finds_any(self, text: str) -> bool:
        """Whether the text has one of the tokens in it."""
        return self._pattern.search(text) is not None

    def split(self, text: str) -> Iterator[tuple[str, bool]]:
        """The parts of a text in their order, and whether each is an added token."""
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
    found: dict[str, AddedToken] = {}
    files = ((SPECIAL_TOKENS, _read_object(folder / SPECIAL_TOKENS)), (TOKENIZER_CONFIG, config))
    for name, value in files:
        where = folder / name
        listed = value.get("additional_special_tokens") or []
        if not isinstance(listed, list):
            raise UserError(f"{where}: additional_special_tokens is no list")
        for one in listed:
            token = _token(one, where=where)
            found.setdefault(token.content, token)
    return found


def _token(value: Any, *, where: Path) -> AddedToken:
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or not content:
        raise UserError(f"{where}: an added token is {str(value)[:80]!r} and has no text")
    flags = {name: value.get(name, False) for name in _FLAGS} if isinstance(value, dict) else {}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise UserError(f"{where}: a flag of the token {content[:80]!r} is not true or false")
    return AddedToken(content=content, **flags)


def _checked_id(value: Any, *, where: Path) -> int:
    if type(value) is not int or not 0 <= value < _LARGEST_ID:
        raise UserError(f"{where}: {str(value)[:80]!r} is no id of a token")
    return value


def _extra_ids(config: Mapping[str, Any], *, where: Path) -> int | None:
    value = config.get("extra_ids")
    if value is not None and (type(value) is not int or not 0 <= value <= 100_000):
        raise UserError(f"{where}: extra_ids is {str(value)[:80]!r}; a whole number expected")
    return value


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value = read_json_file(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {json_type(value)}, not a JSON object")
    return value
