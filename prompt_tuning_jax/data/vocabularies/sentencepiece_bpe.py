"""Reads ``tokenizer.model``: SentencePiece's BPE, in folders of Llama without a tokenizer.json."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from prompt_tuning_jax.data.vocabularies.gguf_metadata import Metadata
from prompt_tuning_jax.data.vocabularies.gguf_tokenizer import spec_of_metadata
from prompt_tuning_jax.data.vocabularies.tokenizer_files import (
    SENTENCEPIECE_BPE,
    SENTENCEPIECE_FILES,
    read_added_tokens,
    read_tokenizer_config,
)
from prompt_tuning_jax.data.vocabularies.tokenizer_spec import (
    TokenizerSpec,
    import_tokenizers,
    no_panic,
)
from prompt_tuning_jax.errors import UserError

_LARGEST = 2**25  # bytes; Gemma's has 4 million
_UNIGRAM, _BPE = 1, 2
_USER_DEFINED = 4


def sentencepiece_spec(path: Path) -> TokenizerSpec:
    """Returns the tokenizer of a SentencePiece model of type BPE, and of the files beside it.

    An input starts with the beginning of sequence unless ``tokenizer_config.json`` says otherwise,
    as in transformers' ``LlamaTokenizer``.  Raises UserError for a damaged file, and for a model
    of another type or with a normalizer of its own.
    """
    spec = spec_of_metadata(_metadata(path), path)
    config = read_tokenizer_config(path.parent)
    added = _add_tokens(spec.tokenizer, path)
    digest = spec.digest
    if added:
        digest = hashlib.sha256(f"{digest} {json.dumps(added)}".encode()).hexdigest()
    special = {**spec.special, **config.special}
    return dataclasses.replace(
        spec,
        digest=digest,
        special=special,
        token_ids=None,
        add_bos="bos_token" in special if config.add_bos is None else config.add_bos,
        chat_template=config.chat_template,
    )


def _metadata(path: Path) -> Metadata:
    """Returns the model as the metadata of a GGUF file would describe it."""
    model = _read(path)
    if model.trainer_spec.model_type != _BPE:
        kind = "unigram" if model.trainer_spec.model_type == _UNIGRAM else "another type"
        raise UserError(
            f"{path}: a SentencePiece model of type {kind}; {SENTENCEPIECE_BPE} must be of type "
            f"BPE; name T5's {SENTENCEPIECE_FILES[0]}"
        )
    normalizer = model.normalizer_spec
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        raise UserError(
            f"{path}: the SentencePiece model normalizes texts ({normalizer.name or 'no name'}); "
            "only the normalizer 'identity' is read, without remove_extra_whitespaces"
        )
    pieces = [
        # As in GGUF files, pieces that texts contain as they are have blanks.
        piece.piece.replace("▁", " ") if piece.type == _USER_DEFINED else piece.piece
        for piece in model.pieces
    ]
    ids = model.trainer_spec
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": np.array([piece.score for piece in model.pieces], np.float32),
        "tokenizer.ggml.token_type": np.array([piece.type for piece in model.pieces], np.int32),
        "tokenizer.ggml.bos_token_id": ids.bos_id,
        "tokenizer.ggml.eos_token_id": ids.eos_id,
        "tokenizer.ggml.unknown_token_id": ids.unk_id,
        "tokenizer.ggml.padding_token_id": ids.pad_id,
        "tokenizer.ggml.add_space_prefix": bool(normalizer.add_dummy_prefix),
    }


def _read(path: Path) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
        model = sentencepiece_model_pb2.ModelProto.FromString(data[:_LARGEST])
    except (OSError, DecodeError) as error:
        line = next(iter(str(error).splitlines()), "")
        raise UserError(f"{path}: not a SentencePiece model, or a damaged one: {line}") from None
    if len(data) > _LARGEST:
        raise UserError(f"{path}: more than {_LARGEST} bytes, which is too large for a vocabulary")
    return model


def _add_tokens(tokenizer: Any, path: Path) -> list[dict[str, Any]]:
    """Adds the tokens that the folder's files append to the SentencePiece model, and returns them.

    Each is its fields, in the order of the ids.
    """
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    tokens = read_added_tokens(path.parent, without=()).by_id
    new = {token_id: token for token_id, token in sorted(tokens.items()) if token_id >= size}
    if list(new) != list(range(size, size + len(new))):
        raise UserError(
            f"{path}: the SentencePiece model has {size} pieces, and the added tokens have ids "
            f"{[*new][:5]}; they must follow the pieces"
        )
    library = import_tokenizers(path)
    with no_panic(path):
        tokenizer.add_special_tokens(
            [library.AddedToken(**vars(token), normalized=False) for token in new.values()]
        )
    return [vars(token) for token in new.values()]
