"""Opens a model by its name or folder: weights, configuration and vocabulary together."""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.bucket import is_address
from prompt_tuning_jax.checkpoints.device_put import place
from prompt_tuning_jax.checkpoints.fingerprint import (
    Sample,
    fingerprint,
    fingerprint_of_samples,
    sample,
)
from prompt_tuning_jax.checkpoints.hf import pretrained
from prompt_tuning_jax.checkpoints.hub import ASSETS, hf_folder, model_location, t5x_vocabulary
from prompt_tuning_jax.checkpoints.lazy import LazyArray
from prompt_tuning_jax.checkpoints.t5x import reader
from prompt_tuning_jax.data.vocabularies.hf_tokenizer import vocabulary_file
from prompt_tuning_jax.data.vocabularies.vocab import AnyVocabulary, Vocabulary, load_vocabulary
from prompt_tuning_jax.distributed import sharding
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.quantization import (
    SCALE,
    Quantization,
    quantize_modules,
    quantized,
)
from prompt_tuning_jax.models.t5.config import T5Config, preset
from prompt_tuning_jax.models.t5.model import T5
from prompt_tuning_jax.typing import Array, DType


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A model of which nothing but headers has been read.

    ``location`` is where it is, a folder or an address; ``source`` the T5X checkpoint there, or the
    folder of a Hugging Face model on this machine; ``params`` are by T5X name, without a prompt
    that was trained with them; ``vocabulary_file`` is for ``load_vocabulary``.
    """

    location: str
    source: reader.T5XCheckpoint | Path
    config: T5Config
    params: dict[str, LazyArray]
    vocabulary_file: Path | None


def open_model(
    name_or_path: str, *, relpos_max_distance: int | None = None, vocabulary: bool = True
) -> OpenedModel:
    """Finds and opens a model: see ``load_model``.

    With ``vocabulary=False`` none is looked for.  Every parameter has exactly one source and every
    array of the checkpoint one use, or UserError lists what is left over on both sides.
    """
    given: object = name_or_path  # not everybody checks types
    if not isinstance(given, str | Path):
        raise UserError(f"a model is opened by its name or path, not by {type(given).__name__}")
    location = model_location(str(name_or_path))
    if not reader.is_t5x(location):
        folder = hf_folder(location)
        config, params, words = pretrained.open_hf(folder)
        return OpenedModel(
            location=location, source=folder, config=config, params=params, vocabulary_file=words
        )
    checkpoint = reader.open_t5x(location)
    params = {name: p for name, p in checkpoint.params.items() if name != reader.PROMPT}
    buckets = reader.config_of(params).relpos_num_buckets
    config = reader.config_of(
        params,
        relpos_max_distance=relpos_max_distance or (128 if buckets == 32 else 2 * buckets),
    )
    words = None
    if vocabulary:
        words = t5x_vocabulary(name_or_path)
        if words is None and not is_address(location):
            words = vocabulary_file(Path(location))
    return OpenedModel(
        location=location,
        source=checkpoint,
        config=config,
        params=params,
        vocabulary_file=words,
    )


def load_model(
    name_or_path: str,
    *,
    dtype: DType = "float32",
    param_dtype: DType | None = None,
    dropout_rate: float = 0.0,
    vocabulary: str = "",
    relpos_max_distance: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    quantization: Quantization = "none",
    rules: sharding.Rules = sharding.RULES,
) -> T5:
    """A frozen T5 with its weights; ``model.vocabulary`` is its vocabulary, or None.

    ``name_or_path`` is ``tiny`` (bundled), ``t5_1_1_lm100k_{small,base,large,xl,xxl}``, a name
    ``org/name`` of the Hugging Face hub, or the folder or ``gs://`` or ``s3://`` address of a model
    of Hugging Face's or a T5X checkpoint.  Activations are computed in ``dtype`` and weights held
    in ``param_dtype`` (``dtype`` unless given).  ``vocabulary`` is a file in place of the model's
    own; ``relpos_max_distance`` is for T5X folders, which do not store it: unless given it is T5's
    128 for 32 buckets, and twice the buckets for toy models with fewer.

    On a ``mesh`` the weights are laid out by ``rules``: each device's part is read from
    the checkpoint and converted by itself, so that the host never holds the model, nor a process
    what the devices of others hold.  With ``quantization`` (``int8`` or ``int4``) each array is
    quantised as soon as it is placed, before the next is read; such a model's fingerprint is that
    of its weights as they are stored.  Raises UserError.
    """
    opened = open_model(
        name_or_path, relpos_max_distance=relpos_max_distance, vocabulary=not vocabulary
    )
    words = _vocabulary(vocabulary or opened.vocabulary_file, opened.config, model=name_or_path)
    param_dtype = dtype if param_dtype is None else param_dtype
    model = abstract_model(
        opened.config,
        dtype=dtype,
        param_dtype=param_dtype,
        dropout_rate=dropout_rate,
        vocabulary=words,
    )
    # Before anything is read.
    _, wanted = param_tree.split(model)
    param_tree.require_same_shapes(opened.params, wanted, of=opened.location, and_of="the model")
    quantize_modules(model, quantization)
    _, wanted = param_tree.split(model)
    shardings = None
    if mesh is not None and mesh.size > 1:
        shapes = {name: array.shape for name, array in wanted.items()}
        shardings = sharding.logical_to_mesh_sharding(
            shapes, param_tree.logical_axes(model), mesh, rules
        )
    samples: dict[str, Sample] = {}

    def finish(name: str, array: Array) -> dict[str, Array]:
        samples[name] = sample(array)
        return quantized(name, array, quantization, shardings=shardings)

    params = place(
        opened.params,
        dtype=param_dtype,
        shardings=shardings,
        title=f"reading {name_or_path}",
        finish=None if quantization == "none" else finish,
        as_stored=lambda name: quantization != "none" and name + SCALE in wanted,
    )
    param_tree.fill(model, params)
    if samples:
        model.original_fingerprint = fingerprint_of_samples(opened.config, samples)
    return model


def random_model(
    preset_name: str,
    *,
    seed: int = 0,
    dtype: DType = "float32",
    param_dtype: DType | None = None,
    dropout_rate: float = 0.0,
    vocabulary: str = "",
    quantization: Quantization = "none",
) -> T5:
    """A T5 of a published size with freshly drawn weights, to pre-train."""
    config = preset(preset_name)
    bundled = ASSETS / preset_name / pretrained.VOCABULARY
    words = _vocabulary(
        vocabulary or (bundled if bundled.is_file() else None), config, model=preset_name
    )
    model = T5(
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
    config: T5Config,
    *,
    dtype: DType,
    param_dtype: DType,
    dropout_rate: float = 0.0,
    vocabulary: AnyVocabulary | None = None,
    quantization: Quantization = "none",
) -> T5:
    """A T5 whose parameters are shapes: the one description that loading fills in."""
    model = nnx.eval_shape(
        lambda: T5(
            config,
            rngs=nnx.Rngs(0),
            dtype=jnp.dtype(dtype),
            param_dtype=jnp.dtype(param_dtype),
            dropout_rate=dropout_rate,
            vocabulary=vocabulary,
        )
    )
    quantize_modules(model, quantization)
    return model


def _vocabulary(path: str | Path | None, config: T5Config, *, model: str) -> AnyVocabulary | None:
    if path is None or path == "":
        return None
    words = load_vocabulary(path, token_ids=config.token_ids)
    too_many = words.size > config.vocab_size >= words.size - words.extra_ids
    if too_many and isinstance(words, Vocabulary) and words.sentinels_are_assumed:
        # No file says how many there are, and the model has no room for T5's 100.
        words = load_vocabulary(path, extra_ids=0, token_ids=config.token_ids)
    # The model may have more rows than pieces: tables are padded to whole lanes.
    if words.size > config.vocab_size:
        raise UserError(
            f"vocabulary {path} has {words.size} pieces and {model} has {config.vocab_size} "
            "embeddings: it does not fit this model; give the one that it was trained with"
        )
    if words.size + 1024 < config.vocab_size:
        raise UserError(
            f"vocabulary {path} has only {words.size} pieces for the {config.vocab_size} "
            f"embeddings of {model}: it is another model's; give the one it was trained with"
        )
    return words
