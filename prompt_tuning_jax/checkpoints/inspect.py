"""Describes models and prompts on disk, from their headers alone."""

import re
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from prompt_tuning_jax.checkpoints.fingerprint import fingerprint_of_samples, sample_lazy
from prompt_tuning_jax.checkpoints.gguf.model import stored_types
from prompt_tuning_jax.checkpoints.hf.config_files import CONFIG
from prompt_tuning_jax.checkpoints.hf.weights import INDEX_SUFFIX, open_weights
from prompt_tuning_jax.checkpoints.hub import is_gguf, model_location
from prompt_tuning_jax.checkpoints.load import ModelCheckpoint, open_model
from prompt_tuning_jax.checkpoints.location import INDEX
from prompt_tuning_jax.checkpoints.parameters import PROMPT, is_trained, require_t5
from prompt_tuning_jax.checkpoints.prompt_file import PromptMetadata, Source, read_prompt
from prompt_tuning_jax.checkpoints.t5x.methods import kind_of
from prompt_tuning_jax.checkpoints.t5x.reader import open_t5x
from prompt_tuning_jax.data.vocabularies.vocab import ByteVocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.causal_lm.config import CausalLMConfig
from prompt_tuning_jax.models.config import ModelConfig
from prompt_tuning_jax.models.t5.config import PRESETS, T5Config
from prompt_tuning_jax.models.t5gemma.config import T5GemmaConfig
from prompt_tuning_jax.models.t5gemma.presets import SIZES
from prompt_tuning_jax.models.vit.config import ViTConfig
from prompt_tuning_jax.storage import expanded
from prompt_tuning_jax.untrusted_input import read_json_file

# The sizes of google-research/byt5.  mT5 and UMT5 have the sizes of T5 1.1.
_BYTE_SIZES: dict[tuple[int, ...], str] = {
    (1472, 6, 64, 3584, 12, 4): "byt5_small",
    (1536, 12, 64, 3968, 18, 6): "byt5_base",
    (1536, 16, 64, 3840, 36, 12): "byt5_large",
    (2560, 32, 64, 6720, 36, 12): "byt5_xl",
    (4672, 64, 64, 12352, 36, 12): "byt5_xxl",
}
_BYTE_ROWS = 384
_MULTILINGUAL_ROWS = (250_100, 250_112)
_UMT5_ROWS = (256_300, 256_384)
_RELPOS_OF_LAYER = re.compile(r"(encoder|decoder)/layers_\d+/relpos_bias/rel_embedding")


def open_source(
    name_or_path: str, *, relpos_max_distance: int | None = None, vocabulary: bool = True
) -> ModelCheckpoint:
    """Opens a model as ``load.open_model`` does.

    A folder with an incomplete T5X checkpoint raises T5X's error.
    """
    folder = expanded(name_or_path)
    if folder.is_dir():
        name_or_path = model_location(name_or_path)
        folder = Path(name_or_path)
    traces = (f"{INDEX}_*", "target.*", "state")
    if (
        folder.is_dir()
        and not (folder / CONFIG).exists()
        and any(path for trace in traces for path in folder.glob(trace))
    ):
        open_t5x(folder)
    return open_model(name_or_path, relpos_max_distance=relpos_max_distance, vocabulary=vocabulary)


def architecture(checkpoint: ModelCheckpoint) -> str:
    """Returns the published architecture, as far as shapes and files determine it."""
    config, kind = checkpoint.config, _model_type(checkpoint)
    if isinstance(config, CausalLMConfig):
        tied = "tied embeddings" if config.tie_embeddings else "a separate output layer"
        return f"{config.model_type} (decoder-only) with {tied}"
    if isinstance(config, T5GemmaConfig):
        name = "T5Gemma 2, text alone" if config.merged else "T5Gemma"
        return f"{name} (encoder-decoder){'' if config.tie_embeddings else ', with its own head'}"
    if isinstance(config, ViTConfig):
        kinds = f"{len(config.labels)} classes" if config.labels else "no classifier"
        size, patch = config.image_size, config.patch_size
        return f"vision transformer for {size} x {size} images in patches of {patch}, {kinds}"
    config = require_t5(config, what="describing such a model")
    gated = len(config.mlp_activations) == 2
    if kind == "umt5" or config.vocab_size in _UMT5_ROWS:
        return "UMT5"
    if any(_RELPOS_OF_LAYER.fullmatch(name) for name in checkpoint.params):
        return "T5 1.1 with a position bias in each layer (UMT5's, and scanned T5X's)"
    if gated and (kind == "mt5" or config.vocab_size in _MULTILINGUAL_ROWS):
        return "mT5"
    if gated and (config.vocab_size == _BYTE_ROWS or _reads_bytes(checkpoint.vocabulary_file)):
        return "ByT5"
    if gated:
        tied = ", with tied embeddings" if config.tie_embeddings else ""
        return f"T5 1.1 (LM-adapted and Flan-T5 are alike){tied}"
    return "T5 1.0" + ("" if config.tie_embeddings else ", with a separate output layer")


def size_name(config: ModelConfig) -> str:
    """Returns the preset with these sizes and any vocabulary; "" if there is none."""
    if isinstance(config, T5GemmaConfig):
        same = (name for name, other in SIZES.items() if _stacks(other) == _stacks(config))
        return next(same, "")
    if not isinstance(config, T5Config):
        return ""
    for name, other in PRESETS.items():
        if (_sizes(config), config.mlp_activations) == (_sizes(other), other.mlp_activations):
            return name
    return _BYTE_SIZES.get(_sizes(config), "")


def layout(checkpoint: ModelCheckpoint) -> str:
    """Returns the format in words, and the number of files if there are several."""
    source = checkpoint.source
    if isinstance(source, Path) and is_gguf(source):
        return source.name
    if isinstance(source, Path):
        file, _ = open_weights(source)
        if file.suffix != ".json":
            return file.name
        shards = len(set(_json(file)["weight_map"].values()))
        return f"{file.name.removesuffix(INDEX_SUFFIX)} in {shards} files"
    kind = "T5X on Orbax" if source.layout == "t5x_orbax" else "T5X native"
    scanned = ", scanned layers" if source.scanned else ""
    return f"{kind}, version {source.version}{scanned}"


def fingerprint_of(checkpoint: ModelCheckpoint) -> str:
    """Returns the model's fingerprint; reads only the parts of its weights that are sampled."""
    samples = {name: sample_lazy(array) for name, array in checkpoint.params.items()}
    return fingerprint_of_samples(checkpoint.config, samples)


def _stacks(config: T5GemmaConfig) -> list[tuple[int, ...]]:
    return [
        (stack.embed_dim, stack.num_heads, stack.head_dim, stack.mlp_dim, stack.num_layers)
        for stack in (config.encoder, config.decoder)
    ] + [(config.merged,)]


def _sizes(config: T5Config) -> tuple[int, ...]:
    return (
        config.embed_dim,
        config.num_heads,
        config.head_dim,
        config.mlp_dim,
        config.num_encoder_layers,
        config.num_decoder_layers,
    )


def _model_type(checkpoint: ModelCheckpoint) -> str:
    if not isinstance(checkpoint.source, Path) or is_gguf(checkpoint.source):
        return ""
    return str(_json(checkpoint.source / CONFIG).get("model_type", ""))


def _reads_bytes(vocabulary_file: Path | None) -> bool:
    """Returns whether it is a ByT5, whose vocabulary is its tokenizer configuration."""
    return vocabulary_file is not None and vocabulary_file.name.endswith(CONFIG)


def _json(path: Path) -> dict[str, Any]:
    """Returns a JSON file that is known to hold an object."""
    value: dict[str, Any] = read_json_file(path)
    return value


# The weights of larger models are read only on request.
_FINGERPRINTED_BYTES = 2_000_000_000


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """A stored model.

    ``size`` is a preset's name or empty; ``dtypes`` counts the parameters stored in each dtype (in
    a GGUF file, each type); ``bytes`` is the size of all parameters as stored; ``step``,
    ``prompt`` (its shape) and ``optimizer_arrays`` are None except for T5X checkpoints, and
    ``method`` and ``trained`` (shapes by name) describe what another method trained there;
    ``fingerprint`` is empty unless it was computed.
    """

    location: str
    is_t5x: bool
    is_gguf: bool
    architecture: str
    size: str
    layout: str
    config: ModelConfig
    parameters: int
    dtypes: dict[str, int]
    bytes: int
    step: int | None
    prompt: tuple[int, ...] | None
    method: str
    trained: dict[str, tuple[int, ...]]
    optimizer_arrays: int | None
    vocabulary: str
    fingerprint: str


def describe_model(name_or_path: str, *, with_fingerprint: bool | None = None) -> ModelDescription:
    """Describes the model that ``load_model`` would load, with the same errors.

    Only headers are read, except for the fingerprint, which needs all weights.
    ``with_fingerprint=None`` computes it for models on this machine of up to 2 GB.
    """
    checkpoint = open_source(name_or_path)
    dtypes, size = _stored(checkpoint)
    if with_fingerprint is None:
        with_fingerprint = size <= _FINGERPRINTED_BYTES and "://" not in checkpoint.location
    t5x = None if isinstance(checkpoint.source, Path) else checkpoint.source
    params = {} if t5x is None else t5x.params
    trained = {name: array.shape for name, array in params.items() if is_trained(name)}
    only_prompt = trained.keys() == {PROMPT}
    return ModelDescription(
        location=checkpoint.location,
        is_t5x=t5x is not None,
        is_gguf=isinstance(checkpoint.source, Path) and is_gguf(checkpoint.source),
        architecture=architecture(checkpoint),
        size=size_name(checkpoint.config),
        layout=layout(checkpoint),
        config=checkpoint.config,
        parameters=dtypes.total(),
        dtypes=dict(dtypes.most_common()),
        bytes=size,
        step=None if t5x is None else t5x.step,
        prompt=trained.get(PROMPT) if only_prompt else None,
        method=kind_of(trained),
        trained={} if only_prompt else trained,
        optimizer_arrays=None if t5x is None else len(t5x.state_names),
        vocabulary=_vocabulary(checkpoint),
        fingerprint=fingerprint_of(checkpoint) if with_fingerprint else "",
    )


def _stored(checkpoint: ModelCheckpoint) -> tuple[Counter[str], int]:
    """Returns the number of parameters of each type, and the bytes of all."""
    if isinstance(checkpoint.source, Path) and is_gguf(checkpoint.source):
        return stored_types(checkpoint.source)
    dtypes: Counter[str] = Counter()
    for array in checkpoint.params.values():
        dtypes[array.dtype.name] += prod(array.shape)
    return dtypes, sum(array.nbytes for array in checkpoint.params.values())


def _vocabulary(checkpoint: ModelCheckpoint) -> str:
    """Describes the vocabulary in words; "" for none, and the error if it cannot be used."""
    try:
        words = checkpoint.vocabulary()
    except UserError as error:
        return f"cannot be used: {error}"
    if words is None:
        return ""
    if isinstance(words, ByteVocabulary):
        return f"bytes, {words.size} ids"
    sentinels = (
        f", {words.extra_ids} of them sentinels added to the file" if words.extra_ids else ""
    )
    return f"{words.path.name}, {words.size:,} ids{sentinels}"


@dataclass(frozen=True, kw_only=True)
class PromptDescription:
    """A stored prompt ``[length, width]``.

    ``dtype`` is the stored one; the norms are Euclidean over the width, one per position; ``fits``
    names the presets (``models.t5.config.PRESETS``) of this width; ``left_out`` counts the rows of
    a PEFT adapter's second copy (``PeftPrompt``).
    """

    format: Source
    length: int
    width: int
    dtype: str
    norm_min: float
    norm_mean: float
    norm_max: float
    metadata: PromptMetadata
    fits: tuple[str, ...]
    left_out: int


def describe_prompt(path: str | Path) -> PromptDescription:
    """Describes any prompt that ``load_prompt`` reads, with the same errors."""
    stored = read_prompt(path)
    length, width = stored.prompt_PD.shape
    norms_P = np.linalg.norm(stored.prompt_PD.astype(np.float64), axis=1)
    return PromptDescription(
        format=stored.source,
        length=length,
        width=width,
        dtype=stored.prompt_PD.dtype.name,
        norm_min=float(norms_P.min()),
        norm_mean=float(norms_P.mean()),
        norm_max=float(norms_P.max()),
        metadata=stored.metadata,
        left_out=stored.adapter.left_out if stored.adapter else 0,
        fits=tuple(name for name, config in PRESETS.items() if config.embed_dim == width),
    )
