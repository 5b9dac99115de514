"""A T5's ``config.json`` and ``tokenizer_config.json`` for transformers 4 and 5."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prompt_tuning_jax.data.vocabularies.added_tokens import FILES, SPECIAL_TOKENS, TOKENIZER_CONFIG
from prompt_tuning_jax.data.vocabularies.hf_tokenizer import TOKENIZER, HfTokenizer
from prompt_tuning_jax.data.vocabularies.vocab import UNK_ID, ByteVocabulary, load_vocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.t5.config import T5Config, TokenIds
from prompt_tuning_jax.untrusted_input import read_json_file

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
VOCABULARY = "spiece.model"
_LARGEST = 2**20  # bytes; transformers' own have a thousand

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
_MT5_DEFAULTS = (
    _T5_DEFAULTS
    | {"vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6}
    | {"feed_forward_proj": "gated-gelu"}
)
# A UMT5 is an mT5 with a relative position bias in every self-attention.
# What T5Config calls the ids, and transformers' defaults.
_TOKEN_IDS = {
    "pad": ("pad_token_id", 0),
    "eos": ("eos_token_id", 1),
    "start": ("decoder_start_token_id", 0),
}
_CLASSES = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}
_DEFAULTS = {"t5": _T5_DEFAULTS, "mt5": _MT5_DEFAULTS, "umt5": _MT5_DEFAULTS}
# Kinds of T5 that transformers knows and this model cannot be.
_OTHERS = {
    "switch_transformers": "whose mlp is a mixture of experts",
    "longt5": "whose attention is local",
}
# transformers reads "gated-gelu" as the tanh form, which is T5 1.1's.
_ACTIVATIONS: dict[str, tuple[str, ...]] = {"relu": ("relu",), "gated-gelu": ("gelu", "linear")}


def read_config(path: Path) -> dict[str, Any]:
    """config.json with transformers' defaults filled in."""
    if not path.exists():
        raise UserError(f"{path.parent} has no {CONFIG}: it is not a Hugging Face model")
    raw = read_json_file(path, of=f"{path} is not readable as JSON", max_bytes=_LARGEST)
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if isinstance(kind, str) and kind in _OTHERS:
        raise UserError(f"{path}: model_type is {kind!r}, {_OTHERS[kind]}")
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        known = ", ".join(_DEFAULTS)
        raise UserError(f"{path}: model_type is {kind!r}; only {known} is read")
    return _DEFAULTS[kind] | {key: value for key, value in raw.items() if value is not None}


def model_type_of(folder: str | Path) -> str:
    """What a folder calls its model: t5, mt5 or umt5.  The first two differ by nothing else."""
    kind: str = read_config(Path(folder) / CONFIG)["model_type"]
    return kind


def scales_outputs(raw: Mapping[str, Any], *, own_head: bool, path: Path) -> bool:
    """Whether the decoder output is scaled before the logits, and these use the embedding table.

    transformers 5 writes ``tie_word_embeddings: true`` for every T5 and says with
    ``scale_decoder_outputs`` what 4.x said with that flag.  An mT5 says it with the flag alone:
    4.x scales it, 5 never does.  So does a UMT5, which both scale where it is tied; that 5 scales
    it before a head of its own, too, is a mistake: published ones were not trained so.
    """
    if raw["model_type"] == "umt5":
        return _flag(raw, "tie_word_embeddings", True, path=path) and not own_head
    if raw["model_type"] == "mt5":
        old = str(raw.get("transformers_version", "")).startswith("4.")
        return _flag(raw, "tie_word_embeddings", False, path=path) and old and not own_head
    tied = _flag(raw, "tie_word_embeddings", True, path=path)
    return _flag(raw, "scale_decoder_outputs", tied, path=path)


def ties_unscaled(raw: Mapping[str, Any], *, path: Path) -> bool:
    """Whether a model that does not scale takes the table for a head that its file lacks."""
    default = raw["model_type"] != "mt5"
    return _flag(raw, "tie_word_embeddings", default, path=path)


def _flag(raw: Mapping[str, Any], key: str, default: bool, *, path: Path) -> bool:
    value = raw.get(key, default)
    if not isinstance(value, bool):
        raise UserError(f"{path}: {key} is {value!r} and must be true or false")
    return value


def config_from(raw: Mapping[str, Any], *, tied: bool, path: Path) -> T5Config:
    """The model that ``raw`` describes; whether its logits are tied takes the weights to tell."""

    def positive(key: str) -> int:
        value = raw[key]
        if type(value) is not int or not 0 < value < 2**31:
            shown = str(value)[:80] if type(value) is int else repr(value)[:80]
            raise UserError(f"{path}: {key} is {shown}; a whole number above 0 expected")
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
        relpos_per_layer=raw["model_type"] == "umt5",
        layer_norm_eps=eps,
        token_ids=token_ids_from(raw, path=path),
    )


def token_ids_from(raw: Mapping[str, Any], *, path: Path) -> TokenIds:
    """The ids of padding, end and start by config.json and generation_config.json beside it.

    The second decides where it says something, as for transformers' ``generate``.
    """
    ids = {
        name: _token_id(raw, key, default, vocab_size=raw["vocab_size"], path=path)
        for name, (key, default) in _TOKEN_IDS.items()
    }
    beside = path.with_name(GENERATION_CONFIG)
    if beside.is_file():
        generation = read_json_file(beside)
        if not isinstance(generation, dict):
            raise UserError(f"{beside} holds a {type(generation).__name__} and no JSON object")
        for name, (key, _) in _TOKEN_IDS.items():
            chosen = _token_id(
                generation, key, ids[name], vocab_size=raw["vocab_size"], path=beside
            )
            if name == "start" and key in raw and chosen != ids[name]:
                raise UserError(
                    f"{beside}: {key} is {chosen}, and {path.name} says {ids[name]}: transformers "
                    "trains with one and generates with the other; make them the same"
                )
            ids[name] = chosen
    return TokenIds(**ids)


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
            f"{path}: {key} is {str(value)[:80]!r}; an id from 0 to {vocab_size - 1} expected"
        )
    return value


def config_to(config: T5Config, dtype: str, *, model_type: str = "t5") -> dict[str, Any]:
    """config.json for transformers 4 (tie_word_embeddings, torch_dtype) and 5 (the others).

    ``model_type`` chooses between t5 and mt5; a bias per layer is a UMT5's whatever it says.
    """
    if model_type not in _DEFAULTS:
        raise UserError(f"model_type is {model_type!r}; only {', '.join(_DEFAULTS)} is written")
    if model_type == "umt5" and not config.relpos_per_layer:
        raise UserError("model_type is 'umt5', and this model has no bias in each of its layers")
    if config.relpos_per_layer:
        model_type = "umt5"
    elif config.tie_embeddings:
        model_type = "t5"  # transformers 5 scales the output of no mT5
    projections = {activations: name for name, activations in _ACTIVATIONS.items()}
    if config.mlp_activations not in projections:
        raise UserError(f"transformers has no T5 with mlp_activations {config.mlp_activations}")
    # transformers 5 looks for this in a T5 alone, and 4 at tie_word_embeddings.
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
    vocabulary_file: str | Path, config: T5Config
) -> dict[str, Path | dict[str, Any]]:
    """The files that give a folder its tokenizer: what to copy, or the JSON to write.

    ``vocabulary_file`` is anything that ``data.vocab.load_vocabulary`` takes but a folder; it must
    fit the model.
    """
    path = Path(vocabulary_file)
    words = load_vocabulary(vocabulary_file)
    if isinstance(words, ByteVocabulary):
        _require_room(words.size, config, path=path, what="ids")
        special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        described = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": words.extra_ids, **special}
        return {TOKENIZER_CONFIG: described}
    if isinstance(words, HfTokenizer):
        _require_room(words.size, config, path=path, what="ids")
        files: dict[str, Path | dict[str, Any]] = {TOKENIZER: path}
        beside = (path.with_name(name) for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS))
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
        "unk_token": words.pieces(UNK_ID),
    }
    return {VOCABULARY: path, TOKENIZER_CONFIG: described}


def _require_room(size: int, config: T5Config, *, path: Path, what: str) -> None:
    if size > config.vocab_size:
        raise UserError(
            f"{path} has {size} {what}, and the model has embeddings for {config.vocab_size}"
        )
