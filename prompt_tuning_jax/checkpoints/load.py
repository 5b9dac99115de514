"""Opens a model by its name or folder: weights, configuration and vocabulary together."""

from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax.checkpoints import hf, t5x
from prompt_tuning_jax.checkpoints.hub import hub_folder, is_hub_name
from prompt_tuning_jax.checkpoints.lazy import LazyArray
from prompt_tuning_jax.data.suggest import suggest
from prompt_tuning_jax.data.vocab import AnyVocabulary, load_vocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.config import T5Config, preset
from prompt_tuning_jax.models.t5 import T5
from prompt_tuning_jax.tree import fill
from prompt_tuning_jax.typing import DType

ASSETS = Path(__file__).parent.parent / "assets"
BUNDLED = ("tiny",)


def load_model(
    name_or_path: str,
    *,
    dtype: DType = "float32",
    param_dtype: DType | None = None,
    dropout_rate: float = 0.0,
    vocabulary: str = "",
    relpos_max_distance: int | None = None,
) -> T5:
    """A frozen T5 with its weights; ``model.vocabulary`` is its vocabulary, or None.

    ``name_or_path`` is ``tiny`` (bundled), a Hugging Face folder or ``org/name`` on its hub, or a
    folder of a T5X checkpoint.  Activations are computed in ``dtype`` and weights held in
    ``param_dtype`` (``dtype`` unless given).  ``vocabulary`` is a file in place of the model's own;
    ``relpos_max_distance`` is for T5X folders, which do not store it: unless given it is T5's 128
    for 32 buckets, and twice the buckets for toy models with fewer.  Raises UserError.
    """
    folder = model_folder(name_or_path)
    params: dict[str, LazyArray]
    if t5x.is_t5x(folder):
        params = dict(t5x.open_t5x(folder).params)
        params.pop(t5x.PROMPT, None)
        buckets = t5x.config_of(params).relpos_num_buckets
        config = t5x.config_of(
            params,
            relpos_max_distance=relpos_max_distance or (128 if buckets == 32 else 2 * buckets),
        )
        vocabulary_file = None
    else:
        config, params, vocabulary_file = hf.open_hf(folder)
    words = _vocabulary(vocabulary or vocabulary_file, config, model=name_or_path)
    param_dtype = dtype if param_dtype is None else param_dtype
    model = abstract_model(
        config, dtype=dtype, param_dtype=param_dtype, dropout_rate=dropout_rate, vocabulary=words
    )
    # One array at a time: the host never holds the whole model beside the devices' copy.
    fill(model, {name: jnp.asarray(p.whole(), param_dtype) for name, p in params.items()})
    return model


def random_model(
    preset_name: str,
    *,
    seed: int = 0,
    dtype: DType = "float32",
    param_dtype: DType | None = None,
    dropout_rate: float = 0.0,
    vocabulary: str = "",
) -> T5:
    """A T5 of a published size with freshly drawn weights, to pre-train."""
    config = preset(preset_name)
    bundled = ASSETS / preset_name / hf.VOCABULARY
    words = _vocabulary(
        vocabulary or (bundled if bundled.is_file() else None), config, model=preset_name
    )
    return T5(
        config,
        rngs=nnx.Rngs(seed),
        dtype=jnp.dtype(dtype),
        param_dtype=jnp.dtype(dtype if param_dtype is None else param_dtype),
        dropout_rate=dropout_rate,
        vocabulary=words,
    )


def abstract_model(
    config: T5Config,
    *,
    dtype: DType,
    param_dtype: DType,
    dropout_rate: float = 0.0,
    vocabulary: AnyVocabulary | None = None,
) -> T5:
    """A T5 whose parameters are shapes: the one description that loading fills in."""
    return nnx.eval_shape(
        lambda: T5(
            config,
            rngs=nnx.Rngs(0),
            dtype=jnp.dtype(dtype),
            param_dtype=jnp.dtype(param_dtype),
            dropout_rate=dropout_rate,
            vocabulary=vocabulary,
        )
    )


def model_folder(name_or_path: str) -> Path:
    """The folder of a bundled model, of a path, or of a name on the hub; UserError for none."""
    if name_or_path in BUNDLED:
        return ASSETS / name_or_path
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir() and is_hub_name(name_or_path):
        return hub_folder(name_or_path)
    if not folder.is_dir():
        raise UserError(
            f"model.name_or_path: {name_or_path!r} is neither a folder nor a bundled model; "
            f"{suggest(name_or_path, BUNDLED)}"
        )
    return folder


def _vocabulary(path: str | Path | None, config: T5Config, *, model: str) -> AnyVocabulary | None:
    if path is None or path == "":
        return None
    words = load_vocabulary(path)
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
