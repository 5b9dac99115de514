"""The tokenizer that a GGUF file describes, built with the tokenizers library.

There are two kinds.  ``gpt2`` is byte-level BPE with merges, whose pre-tokenizer the file only
names.  ``llama`` is SentencePiece's BPE, whose merges follow from the scores of the pieces.  The
names and their patterns are those of llama.cpp (``src/llama-vocab.cpp``), written as in the models'
``tokenizer.json``.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prompt_tuning_jax.data.vocabularies.gguf_metadata import Metadata, read_metadata
from prompt_tuning_jax.data.vocabularies.tokenizer_spec import (
    TokenizerSpec,
    import_tokenizers,
    no_panic,
)
from prompt_tuning_jax.errors import UserError, suggest
from prompt_tuning_jax.models.config import TokenIds

_log = logging.getLogger(__name__)

_PREFIX = "tokenizer.ggml."
CHAT_TEMPLATE = "tokenizer.chat_template"
# Types of tokens.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_SPECIAL_NAMES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
# Tokens that end a generated text as well, in models whose end of sequence is another one.
_ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|end_of_text|>"),
    "<|endoftext|>",
)
_LLAMA3_TOKENS = 128_256
_LONGEST_PIECE = 256  # characters; the longest published ones have 128

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Name of a pre-tokenizer -> the pattern of its words; "" is GPT-2's, "digits" splits digits first,
# and "default" is that of llama.cpp for files that name none, whose patterns split one another.
_GPT2, _DIGITS, _DEFAULT = "", "digits", "default"
_DEFAULT_PATTERNS = (
    r"[\p{P}$+<=>^~|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
# Llama 3's begin inputs with BOS, and merge nothing in a word that is a token; others with its
# pattern do not.
_OF_LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "falcon3")
PRE_TOKENIZERS: Mapping[str, str] = {
    "default": _DEFAULT,
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), _DIGITS),
    **dict.fromkeys((*_OF_LLAMA3, "dbrx", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), _QWEN2),
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), _BLOOM),
}


def gguf_spec(path: Path) -> TokenizerSpec:
    """Returns the tokenizer of a GGUF file.

    Raises UserError for a file without a tokenizer, for an unknown kind or pre-tokenizer, and for
    lists that do not fit together.
    """
    return spec_of_metadata(read_metadata(path), path)


def spec_of_metadata(metadata: Metadata, path: Path) -> TokenizerSpec:
    """Returns the tokenizer that the metadata of a GGUF file describes; ``path`` is for errors."""
    kind = metadata.get(f"{_PREFIX}model")
    if kind is None:
        raise UserError(f"{path}: the file has no tokenizer ({_PREFIX}model)")
    if not isinstance(kind, str) or kind not in ("gpt2", "llama"):
        raise UserError(f"{path}: {_PREFIX}model is {kind!r}; gpt2 and llama tokenizers are read")
    tokens = _tokens(metadata, path)
    types = _numbers(metadata, "token_type", len(tokens), path, default=_NORMAL)
    pre = _pre_tokenizer(metadata, len(tokens), path) if kind == "gpt2" else ""
    with no_panic(path):
        if kind == "gpt2":
            tokenizer = _byte_level(metadata, tokens, pre, path)
        else:
            tokenizer = _sentencepiece(metadata, tokens, types, path)
        _add_tokens(tokenizer, tokens, types, path)
    special = {
        name: tokens[token_id]
        for name, key in _SPECIAL_NAMES.items()
        if (token_id := _token_id(metadata, key, len(tokens), path)) is not None
    }
    template = metadata.get(CHAT_TEMPLATE, "")
    if not isinstance(template, str):
        raise UserError(f"{path}: {CHAT_TEMPLATE} is not a text")
    adds_bos = "bos_token" in special and (kind == "llama" or pre in _OF_LLAMA3)
    adds_bos = _flag(metadata, "add_bos_token", default=adds_bos, path=path)
    return TokenizerSpec(
        tokenizer=tokenizer,
        digest=_digest(metadata),
        special=special,
        token_ids=token_ids_of(metadata, path) if "eos_token" in special else None,
        add_bos=adds_bos,
        chat_template=template,
    )


def token_ids_of(metadata: Metadata, path: Path) -> TokenIds:
    """Returns the special token ids of a decoder-only model, from the metadata of its GGUF file.

    A generated text also ends at the end of a turn, if the file has such a token.  Raises UserError
    if there is no end of sequence.
    """
    tokens = _tokens(metadata, path)
    types = _numbers(metadata, "token_type", len(tokens), path, default=_NORMAL)
    eos = _token_id(metadata, "eos_token_id", len(tokens), path)
    if eos is None:
        raise UserError(f"{path}: the tokenizer has no end of sequence ({_PREFIX}eos_token_id)")
    pad = _token_id(metadata, "padding_token_id", len(tokens), path)
    more = {_token_id(metadata, key, len(tokens), path) for key in ("eot_token_id", "eom_token_id")}
    control = {tokens[i]: i for i in np.flatnonzero(types == _CONTROL).tolist()}
    # SmolLM2's unknown token is <|endoftext|>, and its texts end otherwise.
    unknown = _token_id(metadata, "unknown_token_id", len(tokens), path)
    more |= {control.get(text) for text in _ENDS} - {unknown}
    return TokenIds(
        pad=eos if pad is None else pad,
        eos=eos,
        start=-1,
        more_eos=tuple(sorted(i for i in more if i is not None and i != eos)),
    )


def _byte_level(metadata: Metadata, tokens: Sequence[str], name: str, path: Path) -> Any:
    library = import_tokenizers(path)
    pre, models = library.pre_tokenizers, library.models
    pattern = PRE_TOKENIZERS[name]
    merges = metadata.get(f"{_PREFIX}merges")
    if not isinstance(merges, list):
        raise UserError(f"{path}: the tokenizer has no merges ({_PREFIX}merges)")
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = library.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[_merge(line, vocab, path) for line in merges],
            fuse_unk=False,
            byte_fallback=False,
            ignore_merges=name in _OF_LLAMA3,
        )
    )
    if pattern == _QWEN2:
        tokenizer.normalizer = library.normalizers.NFC()
    if pattern == _DEFAULT:
        splits = [
            pre.Split(library.Regex(each), behavior="isolated", invert=False)
            for each in _DEFAULT_PATTERNS
        ]
        byte_level = pre.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre.Sequence([*splits, byte_level])
    elif pattern == _GPT2:
        tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False, use_regex=True)
    elif pattern == _DIGITS:
        byte_level = pre.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), byte_level])
    else:
        split = pre.Split(library.Regex(pattern), behavior="isolated", invert=False)
        byte_level = pre.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre.Sequence([split, byte_level])
    tokenizer.decoder = library.decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer(metadata: Metadata, number: int, path: Path) -> str:
    """Returns the name of the pre-tokenizer of ``number`` tokens; UserError for an unknown one.

    Old files name none: their architecture tells it, or it is llama.cpp's default.
    """
    name = metadata.get(f"{_PREFIX}pre")
    if name is not None:
        if name not in PRE_TOKENIZERS:
            raise UserError(f"{path}: {_PREFIX}pre: {suggest(str(name), [*PRE_TOKENIZERS])}")
        return str(name)
    architecture = metadata.get("general.architecture")
    if architecture == "llama" and number == _LLAMA3_TOKENS:
        return "llama-bpe"
    of_architecture = {"gpt2": "gpt-2", "bloom": "bloom", "qwen2": "qwen2", "qwen3": "qwen2"}
    if architecture in of_architecture:
        return of_architecture[architecture]
    _log.warning(
        "%s: the file does not name its pre-tokenizer (%spre): texts are split as llama.cpp does "
        "then, which may not be as in training; convert the model again, or name its tokenizer in "
        "model.vocabulary",
        *(path, _PREFIX),
    )
    return _DEFAULT


def _merge(line: str, vocab: Mapping[str, int], path: Path) -> tuple[str, str]:
    left, blank, right = line.partition(" ")
    if not blank or not {left, right, left + right} <= vocab.keys():
        raise UserError(f"{path}: the merge {line[:80]!r} is not of two pieces of the vocabulary")
    return left, right


def _sentencepiece(metadata: Metadata, tokens: Sequence[str], types: np.ndarray, path: Path) -> Any:
    library = import_tokenizers(path)
    scores = _numbers(metadata, "scores", len(tokens), path)
    # The files write user-defined pieces with blanks, and others with "▁".
    vocab = {token: number for number, token in enumerate(tokens)}
    unknown = np.flatnonzero(types == _UNKNOWN)
    unknown_id = _token_id(metadata, "unknown_token_id", len(tokens), path)
    if unknown_id is None and len(unknown):
        unknown_id = int(unknown[0])
    has_bytes = f"<0x{0:02X}>" in vocab
    if unknown_id is None and not has_bytes:
        raise UserError(f"{path}: the tokenizer has neither an unknown token nor bytes")
    tokenizer = library.Tokenizer(
        library.models.BPE(
            vocab=vocab,
            merges=_merges(tokens, types, scores),
            unk_token=None if unknown_id is None else tokens[unknown_id],
            fuse_unk=True,
            byte_fallback=has_bytes,
        )
    )
    normalizers, decoders = library.normalizers, library.decoders
    spaces = [normalizers.Replace(" ", "▁")]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if _flag(metadata, "add_space_prefix", default=True, path=path):
        spaces.insert(0, normalizers.Prepend("▁"))
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges(tokens: Sequence[str], types: np.ndarray, scores: np.ndarray) -> list[tuple[str, str]]:
    """Pairs of pieces whose concatenation is a piece, the best score first.

    SentencePiece merges the neighbors that give the piece of the best score.
    """
    normal = {tokens[i] for i in np.flatnonzero(types == _NORMAL).tolist()}
    merges: list[tuple[str, str]] = []
    for number in np.lexsort((np.arange(len(tokens)), -scores)).tolist():
        piece = tokens[number]
        if types[number] == _NORMAL and 2 <= len(piece) <= _LONGEST_PIECE:
            for cut in range(1, len(piece)):
                left, right = piece[:cut], piece[cut:]
                if left in normal and right in normal:
                    merges.append((left, right))
    return merges


def _add_tokens(tokenizer: Any, tokens: Sequence[str], types: np.ndarray, path: Path) -> None:
    """Control tokens are special; user-defined ones are recognized in texts as they are."""
    library = import_tokenizers(path)
    added = [
        library.AddedToken(token, normalized=False, special=kind != _USER_DEFINED)
        for token, kind in zip(tokens, types.tolist(), strict=True)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    if tokenizer.get_vocab_size(with_added_tokens=True) != len(tokens):
        raise UserError(f"{path}: an added token has no text")


def _tokens(metadata: Metadata, path: Path) -> list[str]:
    tokens = metadata.get(f"{_PREFIX}tokens")
    if not isinstance(tokens, list) or not tokens:
        raise UserError(f"{path}: the tokenizer has no tokens ({_PREFIX}tokens)")
    if len(set(tokens)) < len(tokens):
        twice = next(token for token, count in Counter(tokens).items() if count > 1)
        raise UserError(f"{path}: the token {twice[:80]!r} has two ids")
    return tokens


def _numbers(
    metadata: Metadata, name: str, number: int, path: Path, *, default: int | None = None
) -> np.ndarray:
    values = metadata.get(f"{_PREFIX}{name}")
    if values is None and default is not None:
        return np.full(number, default)
    if not isinstance(values, np.ndarray) or len(values) != number:
        count = "no" if values is None else len(values) if isinstance(values, np.ndarray) else "bad"
        raise UserError(f"{path}: the tokenizer has {number} tokens and {count} {_PREFIX}{name}")
    return np.nan_to_num(values) if values.dtype.kind == "f" else values


def is_no_token(value: object) -> bool:
    """Returns whether the value of a token's id is one that converters write for no token."""
    return type(value) is int and value in (-1, 2**32 - 1)


def _token_id(metadata: Metadata, key: str, number: int, path: Path) -> int | None:
    value = metadata.get(f"{_PREFIX}{key}")
    if value is None or is_no_token(value):
        return None
    if type(value) is not int or not 0 <= value < number:
        raise UserError(f"{path}: {_PREFIX}{key} is {value!r}; the tokenizer has {number} tokens")
    return value


def _flag(metadata: Metadata, name: str, *, default: bool, path: Path) -> bool:
    value = metadata.get(f"{_PREFIX}{name}", default)
    if not isinstance(value, bool):
        raise UserError(f"{path}: {_PREFIX}{name} is {value!r}; it must be true or false")
    return value


def _digest(metadata: Metadata) -> str:
    digest = hashlib.sha256()
    for key in sorted(key for key in metadata if key.startswith(_PREFIX)):
        value = metadata[key]
        digest.update(f"{key}\0".encode())
        if isinstance(value, np.ndarray):
            digest.update(value.tobytes())
        else:
            parts = value if isinstance(value, list) else [str(value)]
            digest.update("\0".join(parts).encode())
    return digest.hexdigest()[:16]
