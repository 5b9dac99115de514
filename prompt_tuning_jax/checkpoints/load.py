"""Opens and loads a model by its name or folder: configuration, weights and vocabulary."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.fingerprint import (
    Sample,
    fingerprint,
    fingerprint_of_samples,
    sample,
    sample_lazy,
)
from prompt_tuning_jax.checkpoints.gguf.model import GGUFModel, open_gguf_model
from prompt_tuning_jax.checkpoints.gguf.tensors import KEPT_TYPES
from prompt_tuning_jax.checkpoints.hf import pretrained
from prompt_tuning_jax.checkpoints.hub import (
    ASSETS,
    hf_folder,
    is_gguf,
    model_location,
    t5x_vocabulary,
)
from prompt_tuning_jax.checkpoints.lazy_arrays import LazyArray, put_on_devices
from prompt_tuning_jax.checkpoints.location import is_address, is_t5x
from prompt_tuning_jax.checkpoints.parameters import config_of, is_trained
from prompt_tuning_jax.checkpoints.t5x.reader import T5XCheckpoint, open_t5x
from prompt_tuning_jax.data.vocabularies.class_vocabulary import ClassVocabulary
from prompt_tuning_jax.data.vocabularies.tokenizer_files import vocabulary_file
from prompt_tuning_jax.data.vocabularies.vocab import (
    AnyVocabulary,
    TextVocabulary,
    Vocabulary,
    load_vocabulary,
    require_t5,
)
from prompt_tuning_jax.distributed import sharding
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.base import Model, model_class
from prompt_tuning_jax.models.config import ModelConfig
from prompt_tuning_jax.models.quantization import (
    MINIMUM,
    SCALE,
    Quantization,
    keep_blocks,
    quantize_modules,
    quantized,
)
from prompt_tuning_jax.models.registry import preset
from prompt_tuning_jax.models.t5.config import T5Config
from prompt_tuning_jax.models.vit.config import ViTConfig
from prompt_tuning_jax.typing import Array, DType

# How to hold weights that a file stores quantized.
Weights: TypeAlias = Literal["dequantized", "quantized"]


@dataclass(frozen=True, kw_only=True)
class ModelCheckpoint:
    """A model of which only the headers have been read.

    Attributes:
      location: its folder or address.
      source: the T5X checkpoint there, or the folder of a Hugging Face model or the GGUF file on
        this machine.
      config: its configuration.
      params: by this project's name, which is T5X's for a T5, without trained prompts and scales.
      vocabulary_file: for ``load_vocabulary``; None if there is none.
      gguf: the opened file if the model is a GGUF file.
    """

    location: str
    source: T5XCheckpoint | Path
    config: ModelConfig
    params: dict[str, LazyArray]
    vocabulary_file: Path | None
    gguf: GGUFModel | None = None

    def vocabulary(self) -> TextVocabulary | None:
        """Returns the vocabulary with the model's special ids; None if there is none."""
        if self.vocabulary_file is None:
            return None
        config = self.config
        return load_vocabulary(
            self.vocabulary_file, token_ids=config.token_ids, max_size=config.vocab_size
        )


def open_model(
    name_or_path: str | Path, *, relpos_max_distance: int | None = None, vocabulary: bool = True
) -> ModelCheckpoint:
    """Finds and opens a model; see ``load_model`` for the arguments.

    ``vocabulary=False`` does not look for a vocabulary.  The arrays of the checkpoint must be
    exactly the model's parameters; otherwise UserError lists what is missing and what is left over.
    """
    given: object = name_or_path  # callers may not check types
    if not isinstance(given, str | Path):
        raise UserError(
            f"a model is opened by its name or path, not by a value of type {type(given).__name__}"
        )
    if relpos_max_distance is not None and relpos_max_distance < 1:
        raise UserError(
            f"relpos_max_distance is {relpos_max_distance}; it must be a positive integer"
        )
    name = str(name_or_path)
    location = model_location(name)
    if relpos_max_distance is not None and not is_t5x(location):
        raise UserError(
            f"relpos_max_distance is for T5X checkpoints, which do not store it, and {name} is none"
        )
    config: ModelConfig
    if is_gguf(Path(location)):
        gguf_model = open_gguf_model(location)
        return ModelCheckpoint(
            location=location,
            source=Path(location),
            config=gguf_model.config,
            params=gguf_model.params,
            vocabulary_file=Path(location),
            gguf=gguf_model,
        )
    if not is_t5x(location):
        folder = hf_folder(location)
        config, params, words = pretrained.open_hf(folder)
        return ModelCheckpoint(
            location=location, source=folder, config=config, params=params, vocabulary_file=words
        )
    checkpoint = open_t5x(location)
    params = {name: p for name, p in checkpoint.params.items() if not is_trained(name)}
    config = config_of(params, relpos_max_distance=relpos_max_distance)
    words = None
    if vocabulary:
        words = t5x_vocabulary(name)
        if words is None and not is_address(location):
            place = Path(location)
            words = vocabulary_file(place.parent if place.is_file() else place)
    return ModelCheckpoint(
        location=location,
        source=checkpoint,
        config=config,
        params=params,
        vocabulary_file=words,
    )


def load_model(
    name_or_path: str | Path,
    *,
    dtype: DType = "float32",
    param_dtype: DType | None = None,
    dropout_rate: float = 0.0,
    vocabulary: str = "",
    relpos_max_distance: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    quantization: Quantization = "none",
    weights: Weights = "dequantized",
    rules: sharding.Rules = sharding.RULES,
) -> Model:
    """Loads a frozen model; ``model.vocabulary`` is its vocabulary, or None.

    Args:
      name_or_path: ``tiny`` (bundled), ``t5_1_1_lm100k_{small,base,large,xl,xxl}``, ``smollm2`` or
        ``gemma3-270m`` (fetched by ``scripts/fetch_model``), ``org/name`` of the Hugging Face hub,
        a ``.gguf`` file, or the folder or ``gs://`` or ``s3://`` address of a Hugging Face model or
        a T5X checkpoint, which may also be one file.
      dtype: of activations.
      param_dtype: of weights; default ``dtype``.
      dropout_rate: of the model in training.
      vocabulary: a file to use instead of the model's vocabulary.
      relpos_max_distance: for T5X checkpoints, which do not store it; default T5's 128 for 32
        buckets, and twice the number of buckets for toy models with fewer.
      mesh: shards the weights by ``rules``.  Each device's part is read and converted separately:
        the host never holds the whole model, nor a process the parts of other processes' devices.
      quantization: ``int8`` or ``int4`` quantizes each array as soon as it is on its devices,
        before the next is read.  The model's fingerprint remains that of the stored weights.
      weights: ``quantized`` keeps the blocks of a GGUF file's types Q8_0, Q4_0 and Q4_1 as int8 and
        int4 with their scales; all values are the same.  Weights of other types are dequantized,
        and a line on standard error says so.
      rules: which mesh axis shards which logical axis.

    Raises UserError.
    """
    checkpoint = open_model(
        name_or_path, relpos_max_distance=relpos_max_distance, vocabulary=not vocabulary
    )
    words = _vocabulary(
        vocabulary, checkpoint.vocabulary_file, checkpoint.config, model=name_or_path
    )
    param_dtype = dtype if param_dtype is None else param_dtype
    model = abstract_model(
        checkpoint.config,
        dtype=dtype,
        param_dtype=param_dtype,
        dropout_rate=dropout_rate,
        vocabulary=words,
    )
    # Checked before any weights are read.
    _, wanted = param_tree.split(model)
    param_tree.require_same_shapes(
        checkpoint.params, wanted, of=checkpoint.location, and_of="the model"
    )
    samples: dict[str, Sample] = {}
    stored = checkpoint.params
    if weights == "quantized":
        if quantization != "none":
            raise UserError(
                f"model.weights is quantized and model.quantization is {quantization}; drop one"
            )
        stored = _with_blocks(checkpoint, model, samples)
    elif quantization != "none":
        quantize_modules(model, quantization)
    _, wanted = param_tree.split(model)
    shardings = None
    if mesh is not None and mesh.size > 1:
        shapes = {name: array.shape for name, array in wanted.items()}
        shardings = sharding.logical_to_mesh_sharding(
            shapes, param_tree.logical_axes(model), mesh, rules
        )
    kept_quantized = {name.removesuffix(SCALE) for name in wanted if name.endswith(SCALE)}

    def finish(name: str, array: Array) -> dict[str, Array]:
        if weights == "dequantized" or name in checkpoint.params.keys() - kept_quantized:
            samples[name] = sample(array)
        return quantized(name, array, quantization, shardings=shardings)

    def as_stored(name: str) -> bool:
        return name.removesuffix(SCALE).removesuffix(MINIMUM) in kept_quantized

    params = put_on_devices(
        stored,
        dtype=param_dtype,
        shardings=shardings,
        title=f"reading {name_or_path}",
        finish=finish if kept_quantized else None,
        as_stored=as_stored,
    )
    param_tree.fill(model, params)
    if samples:
        model.original_fingerprint = fingerprint_of_samples(checkpoint.config, samples)
    return model


def _with_blocks(
    checkpoint: ModelCheckpoint, model: Model, samples: dict[str, Sample]
) -> dict[str, LazyArray]:
    """Returns the parameters with the blocks that the file stores, which the model then has.

    Adds samples of the weights that the blocks replace.
    """
    if checkpoint.gguf is None:
        raise UserError(
            f"model.weights=quantized needs a GGUF file, and {checkpoint.location} is not one; set "
            "model.quantization=int8 to quantize its weights"
        )
    stored = dict(checkpoint.params)
    abstract: dict[str, Any] = {}
    for name, blocks in checkpoint.gguf.blocks.items():
        samples[name] = sample_lazy(stored[name])
        parts = {name: blocks.whole, name + SCALE: blocks.scale}
        if blocks.minimum is not None:
            parts[name + MINIMUM] = blocks.minimum
        stored |= parts
        abstract[name] = {
            part: jax.ShapeDtypeStruct(array.shape, array.dtype) for part, array in parts.items()
        }
    keep_blocks(model, abstract)
    if checkpoint.gguf.dequantized and jax.process_index() == 0:
        others = ", ".join(f"{n:,} of {kind}" for kind, n in checkpoint.gguf.dequantized.items())
        print(
            f"note: model.weights=quantized keeps {', '.join(KEPT_TYPES)}; {checkpoint.location} "
            f"has {others}: these weights are dequantized",
            file=sys.stderr,
        )
    return stored


def random_model(
    preset_name: str,
    *,
    seed: int = 0,
    dtype: DType = "float32",
    param_dtype: DType | None = None,
    dropout_rate: float = 0.0,
    vocabulary: str = "",
    quantization: Quantization = "none",
) -> Model:
    """Returns a published model with random weights, for pre-training and for measurements."""
    config = preset(preset_name)
    bundled = ASSETS / preset_name / pretrained.VOCABULARY
    words = _vocabulary(
        vocabulary, bundled if bundled.is_file() else None, config, model=preset_name
    )
    model: Model = model_class(config)(
        config,
        rngs=nnx.Rngs(seed),
        dtype=jnp.dtype(dtype),
        param_dtype=jnp.dtype(dtype if param_dtype is None else param_dtype),
        dropout_rate=dropout_rate,
        vocabulary=words,
    )
    if quantization != "none":
        model.original_fingerprint = fingerprint(config, param_tree.split(model)[1])
        quantize_modules(model, quantization)
    return model


def abstract_model(
    config: ModelConfig,
    *,
    dtype: DType,
    param_dtype: DType,
    dropout_rate: float = 0.0,
    vocabulary: AnyVocabulary | None = None,
    quantization: Quantization = "none",
) -> Model:
    """Returns a model with abstract parameters (shapes and dtypes), which loading replaces."""
    model: Model = nnx.eval_shape(
        lambda: model_class(config)(
            config,
            rngs=nnx.Rngs(0),
            dtype=jnp.dtype(dtype),
            param_dtype=jnp.dtype(param_dtype),
            dropout_rate=dropout_rate,
            vocabulary=vocabulary,
        )
    )
    if quantization != "none":
        quantize_modules(model, quantization)
    return model


def _vocabulary(
    named: str | Path | None, own: Path | None, config: ModelConfig, *, model: str | Path
) -> AnyVocabulary | None:
    path = named or own
    if isinstance(config, ViTConfig):
        if path:
            raise UserError(
                f"model.vocabulary is {path}, but {model} reads images and has no words; drop it"
            )
        return ClassVocabulary(config)
    if not path:
        return None
    words = load_vocabulary(path, token_ids=config.token_ids, max_size=config.vocab_size)
    if isinstance(config, T5Config):
        require_t5(words)
    too_many = words.size > config.vocab_size >= words.size - words.extra_ids
    if too_many and isinstance(words, Vocabulary) and words.sentinels_are_assumed:
        # No file gives the number of sentinels, and the model has no room for T5's 100.
        words = load_vocabulary(path, extra_ids=0, token_ids=config.token_ids)
    # The model may have more embeddings than pieces, because tables are padded: DeepSeek's by 2 %.
    if words.size > config.vocab_size:
        raise UserError(
            f"vocabulary {path} has {words.size} pieces, but {model} has only {config.vocab_size} "
            "embeddings: use the vocabulary that the model was trained with"
        )
    padding = 1024 if named else max(1024, config.vocab_size // 10)
    if words.size + padding < config.vocab_size:
        raise UserError(
            f"vocabulary {path} has only {words.size} pieces for the {config.vocab_size} "
            f"embeddings of {model}: use the vocabulary that the model was trained with"
        )
    return words
