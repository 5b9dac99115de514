"""A T5's ``config.json`` and ``tokenizer_config.json`` for transformers 4 and 5."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.config import T5Config

CONFIG = "config.json"

# transformers' defaults: folders of its version 4 leave out what equals them.
_T5_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "t5": _T5_DEFAULTS,
    "mt5": _T5_DEFAULTS
    | {"vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6}
    | {"feed_forward_proj": "gated-gelu"},
}
# transformers reads "gated-gelu" as the tanh form, which is T5 1.1's.
_ACTIVATIONS: dict[str, tuple[str, ...]] = {"relu": ("relu",), "gated-gelu": ("gelu", "linear")}


def read_config(path: Path) -> dict[str, Any]:
    """config.json with transformers' defaults filled in."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} has no {CONFIG}: it is not a Hugging Face model") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable as JSON: {error}") from error
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        known = " or ".join(sorted(_DEFAULTS))
        raise UserError(f"{path}: model_type is {kind!r}; only {known} is read")
    return _DEFAULTS[kind] | {key: value for key, value in raw.items() if value is not None}


def config_from(raw: Mapping[str, Any], *, tied: bool, path: Path) -> T5Config:
    """The model that ``raw`` describes; whether its logits are tied takes the weights to tell."""

    def positive(key: str) -> int:
        value = raw[key]
        if type(value) is not int or value < 1:
            raise UserError(f"{path}: {key} is {value!r}; a whole number above 0 expected")
        return value

    projection, eps = raw["feed_forward_proj"], raw["layer_norm_epsilon"]
    if not isinstance(projection, str) or projection not in _ACTIVATIONS:
        known = " or ".join(sorted(_ACTIVATIONS))
        raise UserError(f"{path}: feed_forward_proj is {projection!r}; only {known} is read")
    if not isinstance(eps, float) or not eps > 0:
        raise UserError(f"{path}: layer_norm_epsilon is {eps!r}; a number above 0 expected")
    return T5Config(
        vocab_size=positive("vocab_size"),
        embed_dim=positive("d_model"),
        num_heads=positive("num_heads"),
        head_dim=positive("d_kv"),
        mlp_dim=positive("d_ff"),
        num_encoder_layers=positive("num_layers"),
        num_decoder_layers=positive(
            "num_decoder_layers" if "num_decoder_layers" in raw else "num_layers"
        ),
        mlp_activations=_ACTIVATIONS[projection],
        tie_embeddings=tied,
        relpos_num_buckets=positive("relative_attention_num_buckets"),
        relpos_max_distance=positive("relative_attention_max_distance"),
        layer_norm_eps=eps,
    )


def config_to(config: T5Config, dtype: str) -> dict[str, Any]:
    """config.json for transformers 4 (tie_word_embeddings, torch_dtype) and 5 (the others)."""
    projections = {activations: name for name, activations in _ACTIVATIONS.items()}
    if config.mlp_activations not in projections:
        raise UserError(f"transformers has no T5 with mlp_activations {config.mlp_activations}")
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.embed_dim,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_dim,
        "num_heads": config.num_heads,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "feed_forward_proj": projections[config.mlp_activations],
        "relative_attention_num_buckets": config.relpos_num_buckets,
        "relative_attention_max_distance": config.relpos_max_distance,
        "layer_norm_epsilon": config.layer_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "scale_decoder_outputs": config.tie_embeddings,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def tokenizer_config(vocabulary_file: str | Path, config: T5Config) -> dict[str, Any]:
    """What transformers' T5Tokenizer needs to know beside ``spiece.model``."""
    import sentencepiece

    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary_file))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{vocabulary_file} is not a SentencePiece vocabulary") from error
    room = config.vocab_size - pieces.vocab_size()
    if room < 0:
        raise UserError(
            f"{vocabulary_file} has {pieces.vocab_size()} pieces, "
            f"and the model has embeddings for {config.vocab_size}"
        )
    special = {"pad_token": pieces.pad_id(), "eos_token": pieces.eos_id()}
    if special != {"pad_token": 0, "eos_token": 1} or pieces.unk_id() < 0:
        raise UserError(f"{vocabulary_file}: T5 needs padding at 0, end of text at 1, and unknown")
    special["unk_token"] = pieces.unk_id()
    return {
        "tokenizer_class": "T5Tokenizer",
        "extra_ids": min(room, 100),
        **{key: pieces.id_to_piece(token) for key, token in special.items()},
    }
