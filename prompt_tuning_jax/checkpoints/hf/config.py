"""``config.json`` and the tokenizer's files for transformers 4 and 5, above all those of a T5."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prompt_tuning_jax.checkpoints.hf.config_files import (
    CONFIG,
    GENERATION_CONFIG,
    MOST_CONFIG_BYTES,
    read_generation_config,
)
from prompt_tuning_jax.checkpoints.hf.families import FAMILIES, T5GEMMA_FAMILIES
from prompt_tuning_jax.data.vocabularies.hf_tokenizer import HfTokenizer
from prompt_tuning_jax.data.vocabularies.tokenizer_files import (
    CHAT_TEMPLATE,
    FILES,
    SPECIAL_TOKENS,
    TOKENIZER,
    TOKENIZER_CONFIG,
)
from prompt_tuning_jax.data.vocabularies.vocab import ByteVocabulary, load_vocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.config import ModelConfig, TokenIds
from prompt_tuning_jax.models.t5.config import T5Config
from prompt_tuning_jax.untrusted_input import read_json_file

VOCABULARY = "spiece.model"

# transformers' defaults, which folders of version 4 leave out.
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
_MT5_DEFAULTS = (
    _T5_DEFAULTS
    | {"vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6}
    | {"feed_forward_proj": "gated-gelu"}
)
# T5Config's name -> transformers' name, and its default.
_TOKEN_IDS = {
    "pad": ("pad_token_id", 0),
    "eos": ("eos_token_id", 1),
    "start": ("decoder_start_token_id", 0),
}
VISION = ("vit",)  # read images; see hf.vit
_CLASSES = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}
# A UMT5 is an mT5 with a relative position bias in every self-attention.
_DEFAULTS = {"t5": _T5_DEFAULTS, "mt5": _MT5_DEFAULTS, "umt5": _MT5_DEFAULTS}
# Architectures of transformers that are not supported.
_UNSUPPORTED = {
    "switch_transformers": "which has a mixture of experts",
    "longt5": "which has local attention",
}
# transformers' "gated-gelu" is the tanh approximation, as in T5 1.1.
_ACTIVATIONS: dict[str, tuple[str, ...]] = {"relu": ("relu",), "gated-gelu": ("gelu", "linear")}


def read_config(path: Path) -> dict[str, Any]:
    """Returns config.json, for a T5 with transformers' defaults filled in.

    Raises UserError for a ``model_type`` that is not supported.
    """
    if not path.exists():
        raise UserError(f"{path.parent} has no {CONFIG}: it is not a Hugging Face model")
    raw = read_json_file(path, of=f"{path} is not valid JSON", max_bytes=MOST_CONFIG_BYTES)
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if isinstance(kind, str) and kind in _UNSUPPORTED:
        raise UserError(
            f"{path}: model_type is {kind!r}, {_UNSUPPORTED[kind]} and is not supported"
        )
    known_types = (*_DEFAULTS, *T5GEMMA_FAMILIES, *FAMILIES, *VISION)
    if not isinstance(kind, str) or kind not in known_types:
        known = ", ".join(known_types)
        raise UserError(f"{path}: model_type is {repr(kind)[:80]}; supported: {known}")
    if kind not in _DEFAULTS:
        return dict(raw)
    return _DEFAULTS[kind] | {key: value for key, value in raw.items() if value is not None}


def is_t5(model_type: str) -> bool:
    """Returns whether a ``model_type`` is one of T5's own family."""
    return model_type in _DEFAULTS


def model_type_of(folder: str | Path) -> str:
    """Returns the model_type of a folder.  T5 1.1 and mT5 differ in nothing else."""
    kind: str = read_config(Path(folder) / CONFIG)["model_type"]
    return kind


def scales_outputs(raw: Mapping[str, Any], *, has_head: bool, path: Path) -> bool:
    """Returns whether the logits are the scaled decoder output times the embedding table.

    transformers 5 writes ``tie_word_embeddings: true`` for every T5, and ``scale_decoder_outputs``
    has the meaning that this flag had in 4.x.  An mT5 has only the flag: 4.x scales, 5 never does.
    A UMT5 has only the flag, too, and both scale if it is tied.  (transformers 5 also scales before
    a separate head; that is a bug, since published models were not trained so.)
    """
    if raw["model_type"] == "umt5":
        return _flag(raw, "tie_word_embeddings", True, path=path) and not has_head
    if raw["model_type"] == "mt5":
        old = str(raw.get("transformers_version", "")).startswith("4.")
        return _flag(raw, "tie_word_embeddings", False, path=path) and old and not has_head
    tied = _flag(raw, "tie_word_embeddings", True, path=path)
    return _flag(raw, "scale_decoder_outputs", tied, path=path)


def ties_unscaled(raw: Mapping[str, Any], *, path: Path) -> bool:
    """Returns whether the embedding table is the head, without scaling.

    Applies to a model without scaled outputs and without a stored head.
    """
    default = raw["model_type"] != "mt5"
    return _flag(raw, "tie_word_embeddings", default, path=path)


def _flag(raw: Mapping[str, Any], key: str, default: bool, *, path: Path) -> bool:
    value = raw.get(key, default)
    if not isinstance(value, bool):
        raise UserError(f"{path}: {key} is {value!r} and must be true or false")
    return value


def config_from(raw: Mapping[str, Any], *, tied: bool, path: Path) -> T5Config:
    """Returns the configuration of ``raw``; ``tied`` depends on the weights, too."""

    def positive(key: str) -> int:
        value = raw[key]
        if type(value) is not int or not 0 < value < 2**31:
            shown = str(value)[:80] if type(value) is int else repr(value)[:80]
            raise UserError(f"{path}: {key} is {shown}; it must be a positive integer")
        return value

    projection, eps = raw["feed_forward_proj"], raw["layer_norm_epsilon"]
    if not isinstance(projection, str) or projection not in _ACTIVATIONS:
        known = " or ".join(sorted(_ACTIVATIONS))
        raise UserError(f"{path}: feed_forward_proj is {projection!r}; supported: {known}")
    if not isinstance(eps, float) or not eps > 0:
        raise UserError(f"{path}: layer_norm_epsilon is {eps!r}; it must be a positive number")
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
        relpos_per_layer=raw["model_type"] == "umt5",
        layer_norm_eps=eps,
        token_ids=token_ids_from(raw, path=path),
    )


def token_ids_from(raw: Mapping[str, Any], *, path: Path) -> TokenIds:
    """Returns the ids of padding, end and start from config.json and generation_config.json.

    The latter takes precedence, as in transformers' ``generate``.
    """
    ids = {
        name: _token_id(raw, key, default, vocab_size=raw["vocab_size"], path=path)
        for name, (key, default) in _TOKEN_IDS.items()
    }
    generation, beside = read_generation_config(path), path.with_name(GENERATION_CONFIG)
    for name, (key, _) in _TOKEN_IDS.items():
        chosen = _token_id(generation, key, ids[name], vocab_size=raw["vocab_size"], path=beside)
        if name == "start" and key in raw and chosen != ids[name]:
            raise UserError(
                f"{beside}: {key} is {chosen}, but {ids[name]} in {path.name}: transformers would "
                "train with one and generate with the other; make them equal"
            )
        ids[name] = chosen
    return TokenIds(pad=ids["pad"], eos=ids["eos"], start=ids["start"])


def _token_id(
    raw: Mapping[str, Any], key: str, default: int, *, vocab_size: int, path: Path
) -> int:
    value = raw.get(key)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None:
        return default
    if isinstance(value, list):
        raise UserError(f"{path}: {key} is {str(value)[:80]}; only one id is supported")
    if type(value) is not int or not 0 <= value < vocab_size:
        raise UserError(
            f"{path}: {key} is {str(value)[:80]!r}; it must be an id from 0 to {vocab_size - 1}"
        )
    return value


def config_to(config: T5Config, dtype: str, *, model_type: str = "t5") -> dict[str, Any]:
    """Returns config.json for transformers 4 and 5.

    Version 4 reads tie_word_embeddings and torch_dtype, version 5 the other fields.

    ``model_type`` is t5 or mt5; models with a bias per layer are always umt5.
    """
    if model_type not in _DEFAULTS:
        raise UserError(f"model_type is {model_type!r}; supported: {', '.join(_DEFAULTS)}")
    if model_type == "umt5" and not config.relpos_per_layer:
        raise UserError("model_type is 'umt5', but this model has no position bias in each layer")
    if config.relpos_per_layer:
        model_type = "umt5"
    elif config.tie_embeddings:
        model_type = "t5"  # transformers 5 never scales the output of an mT5
    projections = {activations: name for name, activations in _ACTIVATIONS.items()}
    if config.mlp_activations not in projections:
        raise UserError(f"transformers has no T5 with mlp_activations {config.mlp_activations}")
    # Used by transformers 5, and only for a T5; version 4 uses tie_word_embeddings.
    scaled = {"scale_decoder_outputs": config.tie_embeddings} if model_type == "t5" else {}
    return {
        "architectures": [f"{_CLASSES[model_type]}ForConditionalGeneration"],
        "model_type": model_type,
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
        **scaled,
        "decoder_start_token_id": config.token_ids.start,
        "pad_token_id": config.token_ids.pad,
        "eos_token_id": config.token_ids.eos,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def tokenizer_files(
    vocabulary_file: str | Path, config: ModelConfig
) -> dict[str, Path | dict[str, Any]]:
    """Returns the tokenizer's files for a folder: files to copy, or JSON to write.

    ``vocabulary_file`` is anything that ``load_vocabulary`` accepts except a folder; it must fit
    the model.
    """
    path = Path(vocabulary_file)
    words = load_vocabulary(vocabulary_file, token_ids=config.token_ids, max_size=config.vocab_size)
    if isinstance(words, ByteVocabulary):
        _require_room(words.size, config, path=path, what="ids")
        special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        described = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": words.extra_ids, **special}
        return {TOKENIZER_CONFIG: described}
    if isinstance(words, HfTokenizer):
        _require_room(words.size, config, path=path, what="ids")
        if path.name != TOKENIZER:
            tokenizer, described = words.as_json()
            return {TOKENIZER: tokenizer, TOKENIZER_CONFIG: described}
        files: dict[str, Path | dict[str, Any]] = {TOKENIZER: path}
        names = (TOKENIZER_CONFIG, SPECIAL_TOKENS, CHAT_TEMPLATE)
        beside = (path.with_name(name) for name in names)
        return files | {other.name: other for other in beside if other.is_file()}
    if words.has_added_tokens:
        _require_room(words.size, config, path=path, what="ids")
        listing = (path.with_name(name) for name in FILES)
        return {VOCABULARY: path, **{file.name: file for file in listing if file.is_file()}}
    _require_room(words.size - words.extra_ids, config, path=path, what="pieces")
    room = config.vocab_size - (words.size - words.extra_ids)
    described = {
        "tokenizer_class": "T5Tokenizer",
        "extra_ids": min(room, words.extra_ids),
        "pad_token": words.pieces(0),
        "eos_token": words.pieces(words.eos_id),
        "unk_token": words.pieces(words.unk_id),
    }
    return {VOCABULARY: path, TOKENIZER_CONFIG: described}


def _require_room(size: int, config: ModelConfig, *, path: Path, what: str) -> None:
    if size > config.vocab_size:
        raise UserError(
            f"{path} has {size} {what}, but the model has only {config.vocab_size} embeddings"
        )
