"""Reads ``tokenizer.json``, or the ``vocab.json`` and ``merges.txt`` from which it is made."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prompt_tuning_jax.data.vocabularies.tokenizer_files import (
    BPE_MERGES,
    AddedToken,
    read_added_tokens,
    read_tokenizer_config,
)
from prompt_tuning_jax.data.vocabularies.tokenizer_spec import (
    TokenizerSpec,
    import_tokenizers,
    no_panic,
    quiet_errors,
)
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.untrusted_input import json_text, read_json

_LARGEST = 2**27  # bytes; the largest published ones have 35 million
# The library panics on patterns in the file that take too long: these texts find that early.
_PROBES = (
    "",
    *(f"{part * 40}{end}" for part in ("a", "1", " ", ".", "aB ") for end in ("!", "\0")),
)


def parse_tokenizer(text: str, *, path: Path) -> Any:
    """Returns the ``tokenizers.Tokenizer`` in the text of a tokenizer.json.

    Raises UserError for a damaged one.
    """
    library = import_tokenizers(path)
    with no_panic(path), quiet_errors():
        tokenizer = library.Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        for probe in _PROBES:
            tokenizer.encode(probe, add_special_tokens=False)
    return tokenizer


def tokenizer_as_json(tokenizer: Any, *, path: Path) -> dict[str, Any]:
    """Returns the content of a tokenizer.json."""
    content: dict[str, Any] = read_json(tokenizer.to_str(), of=str(path), max_bytes=_LARGEST)
    return content


def post_processor(first: Mapping[str, int]) -> dict[str, Any] | None:
    """Returns what in a tokenizer.json puts these tokens, with their ids, in front of an input."""
    if not first:
        return None
    starts = [{"SpecialToken": {"id": token, "type_id": 0}} for token in first]
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [*starts, text],
        "pair": [*starts, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            token: {"id": token, "ids": [token_id], "tokens": [token]}
            for token, token_id in first.items()
        },
    }


def json_spec(path: Path, *, max_size: int | None) -> TokenizerSpec:
    """Returns the tokenizer of a tokenizer.json, with what the files beside it say.

    Added tokens with an id of ``max_size`` or more are left out.
    """
    text = _read(path)
    tokenizer = parse_tokenizer(text, path=path)
    added = tokenizer.get_added_tokens_decoder()
    if max_size is not None and any(token_id >= max_size for token_id in added):
        content = read_json(text, of=str(path), max_bytes=_LARGEST)
        content["added_tokens"] = [one for one in content["added_tokens"] if one["id"] < max_size]
        text = json_text(content)
        tokenizer = parse_tokenizer(text, path=path)
    return _spec(tokenizer, text, path.parent)


def bpe_spec(path: Path) -> TokenizerSpec:
    """Returns GPT-2's byte-level BPE in ``vocab.json`` and the ``merges.txt`` beside it."""
    vocab = read_json(_read(path), of=str(path), max_bytes=_LARGEST)
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        raise UserError(f"{path}: a vocabulary is an object of ids by token")
    lines = _read(path.with_name(BPE_MERGES)).splitlines()
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    config = read_tokenizer_config(path.parent)
    added = dict(read_added_tokens(path.parent).by_id)
    for special in config.special.values():
        if special in vocab:
            added.setdefault(vocab[special], AddedToken(content=special))
    byte_level: dict[str, Any] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    content: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [
            {"id": token_id, **vars(token), "normalized": False, "special": True}
            for token_id, token in sorted(added.items())
        ],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    text = json_text(content)
    return _spec(parse_tokenizer(text, path=path), text, path.parent)


def _spec(tokenizer: Any, text: str, folder: Path) -> TokenizerSpec:
    config = read_tokenizer_config(folder)
    return TokenizerSpec(
        tokenizer=tokenizer,
        digest=hashlib.sha256(text.encode()).hexdigest()[:16],
        special=config.special,
        add_bos=config.add_bos,
        chat_template=config.chat_template,
    )


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the vocabulary: {error}") from None
    if len(data) > _LARGEST:
        raise UserError(f"{path}: more than {_LARGEST} bytes, which is too large for a vocabulary")
    return text
