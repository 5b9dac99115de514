"""Reads and writes Hugging Face folders of all families.

A folder has ``config.json``, weights (``hf.weights``) and a vocabulary.  T5 1.0 and 1.1, mT5 and
UMT5 are read here, with names and layouts of transformers' modeling_t5.py; torch's kernels are
[out, in], and here they are [in, out].  Decoder-only families are read in ``hf.causal``, T5Gemmas
in ``hf.t5gemma``, and vision transformers in ``hf.vit``.
"""

import dataclasses
import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, Literal

import numpy as np

from prompt_tuning_jax.checkpoints.hf.causal import causal_as_hf, open_causal
from prompt_tuning_jax.checkpoints.hf.config import (
    VISION,
    VOCABULARY,
    config_from,
    config_to,
    model_type_of,
    read_config,
    scales_outputs,
    ties_unscaled,
    tokenizer_files,
)
from prompt_tuning_jax.checkpoints.hf.config_files import CONFIG
from prompt_tuning_jax.checkpoints.hf.families import FAMILIES, T5GEMMA_FAMILIES
from prompt_tuning_jax.checkpoints.hf.index import HfModel, write_folder
from prompt_tuning_jax.checkpoints.hf.t5gemma import open_t5gemma, t5gemma_as_hf
from prompt_tuning_jax.checkpoints.hf.vit import open_vit, vit_as_hf
from prompt_tuning_jax.checkpoints.hf.weights import open_weights
from prompt_tuning_jax.checkpoints.lazy_arrays import LazyArray, equal_bits
from prompt_tuning_jax.checkpoints.parameters import (
    EMBEDDING,
    LOGITS,
    RELPOS,
    parameter_shapes,
    require_parameters,
    require_t5,
)
from prompt_tuning_jax.data.vocabularies.tokenizer_files import vocabulary_file as find_vocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.causal_lm.config import CausalLMConfig
from prompt_tuning_jax.models.config import ModelConfig
from prompt_tuning_jax.models.quantization import is_quantized
from prompt_tuning_jax.models.t5.config import T5Config
from prompt_tuning_jax.models.t5gemma.config import T5GemmaConfig
from prompt_tuning_jax.models.vit.config import ViTConfig
from prompt_tuning_jax.typing import Array, HostArray

__all__ = ["VOCABULARY", "hf_name", "model_type_of", "open_hf", "read_hf", "write_hf"]

_SHARED = "shared.weight"
_LM_HEAD = "lm_head.weight"
COPIES_OF_SHARED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# Files of T5 1.0 have a bias that cross attention never uses.
_UNUSED = re.compile(
    r"decoder\.block\.\d+\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
)
_SUBLAYERS = {
    "encoder/relpos_bias": "layer.0.SelfAttention.relative_attention_bias",
    "encoder/pre_attention_layer_norm": "layer.0.layer_norm",
    "encoder/attention": "layer.0.SelfAttention",
    "encoder/pre_mlp_layer_norm": "layer.1.layer_norm",
    "encoder/mlp": "layer.1.DenseReluDense",
    "decoder/relpos_bias": "layer.0.SelfAttention.relative_attention_bias",
    "decoder/pre_self_attention_layer_norm": "layer.0.layer_norm",
    "decoder/self_attention": "layer.0.SelfAttention",
    "decoder/pre_cross_attention_layer_norm": "layer.1.layer_norm",
    "decoder/encoder_decoder_attention": "layer.1.EncDecAttention",
    "decoder/pre_mlp_layer_norm": "layer.2.layer_norm",
    "decoder/mlp": "layer.2.DenseReluDense",
}
TRANSPOSED = ("/kernel", "/rel_embedding")
_PROJECTIONS = {"query": "q", "key": "k", "value": "v", "out": "o"}


_LAYER = re.compile(r"(?:encoder|decoder)\.block\.\d+")


def open_hf(folder: str | Path) -> tuple[ModelConfig, dict[str, LazyArray], Path | None]:
    """Returns a model as (configuration, parameters by our name, vocabulary file).

    Parameters keep their stored dtype.

    Only headers are read, and copies of the embedding table, which must be identical in a T5.  The
    arrays of the folder must be exactly the model's parameters; otherwise UserError lists what is
    missing and what is left over.  The vocabulary file is for ``load_vocabulary``.
    """
    folder = Path(folder)
    raw = read_config(folder / CONFIG)
    config: ModelConfig
    if raw["model_type"] in VISION:
        return *open_vit(folder, raw), None
    if raw["model_type"] in FAMILIES:
        config, params = open_causal(folder, raw)
    elif raw["model_type"] in T5GEMMA_FAMILIES:
        config, params = open_t5gemma(folder, raw)
    else:
        config, params = _open_t5(folder, raw)
    return config, params, find_vocabulary(folder)


def _open_t5(folder: Path, raw: Mapping[str, Any]) -> tuple[T5Config, dict[str, LazyArray]]:
    from prompt_tuning_jax.param_tree import require_same_names

    path, arrays = open_weights(folder)
    arrays = {name: array for name, array in arrays.items() if not _UNUSED.fullmatch(name)}
    arrays = _without_copies(arrays, path=path)
    tied, arrays = _with_head(raw, arrays, folder=folder)
    config = config_from(raw, tied=tied, path=folder / CONFIG)
    layers = {match[0] for name in arrays if (match := _LAYER.match(name))}
    _require_possible_layers(config, layers, arrays=len(arrays), path=path)
    shapes = parameter_shapes(config)
    theirs = {name: hf_name(name) for name in shapes}
    wanted = dict.fromkeys(theirs.values())
    missing = sorted({m[0] for name in wanted if (m := _LAYER.match(name))} - layers)
    if missing and not arrays.keys() - wanted.keys():
        raise UserError(
            f"{path} has no arrays of {', '.join(missing)}, which {CONFIG} (num_layers, "
            "num_decoder_layers) requires: the copy is incomplete, or the config is another model's"
        )
    require_same_names(arrays, wanted, of=str(path), and_of=CONFIG)
    params = {
        name: arrays[source].transposed() if _is_transposed(name) else arrays[source]
        for name, source in theirs.items()
    }
    for name, array in params.items():
        if array.shape != shapes[name]:
            raise UserError(
                f"{path}: {theirs[name]} makes {name} {list(array.shape)}, "
                f"but by {CONFIG} it is {list(shapes[name])}"
            )
    return config, params


def _require_possible_layers(
    config: T5Config, layers: Set[str], *, arrays: int, path: Path
) -> None:
    """Raises UserError for more layers than the file has arrays, before all layers are listed."""
    for stack, number in (
        ("encoder", config.num_encoder_layers),
        ("decoder", config.num_decoder_layers),
    ):
        if number > arrays:
            present = sum(layer.startswith(stack) for layer in layers)
            raise UserError(
                f"{path} has {present} {stack} layers, but {CONFIG} (num_layers, "
                f"num_decoder_layers) requires {number}: the config is damaged or another model's"
            )


def read_hf(folder: str | Path) -> tuple[ModelConfig, dict[str, HostArray], Path | None]:
    """Returns ``open_hf`` with all arrays in memory, contiguous."""
    config, params, vocabulary = open_hf(folder)
    read = {name: np.ascontiguousarray(array.whole()) for name, array in params.items()}
    return config, read, vocabulary


def write_hf(
    folder: str | Path,
    config: ModelConfig,
    params: Mapping[str, Array | HostArray | LazyArray],
    *,
    vocabulary_file: str | Path | None = None,
    dtype: Literal["float32", "bfloat16", "float16", "stored"] = "bfloat16",
    max_shard_bytes: int = 5_000_000_000,
    model_type: str = "t5",
) -> None:
    """Writes a model as a folder that transformers loads.

    Args:
      folder: written atomically; in an existing one, the safetensors files of an earlier model are
        removed, and other files stay.
      config: of the model.
      params: by our name, exactly those of ``config``; read and written shard by shard.
      vocabulary_file: written as the tokenizer, if there is one, with the files beside it.
      dtype: of the weights; ``stored`` keeps each array's dtype, and then they read back bit for
        bit.
      max_shard_bytes: larger weights are split into several files with an index.
      model_type: ``mt5`` (``model_type_of`` the folder that was read) for an mT5, which is
        otherwise written as a T5 1.1.  Models with biases per layer are always UMT5, and
        decoder-only models and T5Gemmas have their type in ``config``.
    """
    if is_quantized(params):
        raise UserError(
            "the parameters are quantized, and only full weights are written: load the model "
            "without quantization"
        )
    require_parameters(params, config, of="the parameters")
    lazy = {name: _as_lazy(name, array) for name, array in params.items()}
    if isinstance(config, CausalLMConfig):
        model = causal_as_hf(config, lazy)
    elif isinstance(config, T5GemmaConfig):
        model = t5gemma_as_hf(config, lazy)
    elif isinstance(config, ViTConfig):
        model = vit_as_hf(config, lazy)
    else:
        t5 = require_t5(config, what="writing a Hugging Face folder")
        model = _t5_as_hf(t5, lazy, model_type=model_type)
    tokenizer = tokenizer_files(vocabulary_file, config) if vocabulary_file else {}
    model = dataclasses.replace(model, files={**model.files, **tokenizer})
    write_folder(Path(folder), model, dtype=dtype, max_shard_bytes=max_shard_bytes)


def _t5_as_hf(config: T5Config, params: Mapping[str, LazyArray], *, model_type: str) -> HfModel:
    return HfModel(
        arrays={
            hf_name(name): array.transposed() if _is_transposed(name) else array
            for name, array in params.items()
        },
        describe=lambda stored: config_to(config, stored, model_type=model_type),
    )


def hf_name(name: str) -> str:
    """Returns transformers' name of a parameter.

    encoder/layers_3/mlp/wo/kernel -> encoder.block.3.layer.1.DenseReluDense.wo.weight.
    """
    if name in (EMBEDDING, LOGITS):
        return _SHARED if name == EMBEDDING else _LM_HEAD
    stack, block, *rest = name.split("/")
    if block == "relpos_bias":
        return hf_name(f"{stack}/layers_0/{RELPOS}")
    if block == f"{stack}_norm":
        return f"{stack}.final_layer_norm.weight"
    sublayer, *projection = rest[:-1]
    parts = [stack, "block", block.removeprefix("layers_"), _SUBLAYERS[f"{stack}/{sublayer}"]]
    parts += [_PROJECTIONS.get(p, p) for p in projection]
    return ".".join([*parts, "weight"])


def _is_transposed(name: str) -> bool:
    return name.endswith(TRANSPOSED)


def _as_lazy(name: str, array: Array | HostArray | LazyArray) -> LazyArray:
    if isinstance(array, LazyArray):
        return array
    return LazyArray(
        shape=array.shape,
        dtype=np.dtype(array.dtype),
        where=name,
        read=lambda index: np.asarray(array)[index],
    )


def _without_copies(arrays: Mapping[str, LazyArray], *, path: Path) -> dict[str, LazyArray]:
    """Returns the arrays with the embedding table once, under its name ``shared.weight``."""
    tables = [name for name in (_SHARED, *COPIES_OF_SHARED) if name in arrays]
    if not tables:
        return dict(arrays)
    for name in tables[1:]:
        if not equal_bits(arrays[name], arrays[tables[0]]):
            raise UserError(f"{path}: {name} is not a copy of {tables[0]}")
    rest = {name: array for name, array in arrays.items() if name not in tables}
    return {_SHARED: arrays[tables[0]], **rest}


def _with_head(
    raw: Mapping[str, Any], arrays: Mapping[str, LazyArray], *, folder: Path
) -> tuple[bool, dict[str, LazyArray]]:
    """Returns whether the logits are scaled output times table (T5 1.0), and the arrays.

    A copy of the table as head is dropped from tied models; models that use the table unscaled get
    it as their head.
    """
    head, table = arrays.get(_LM_HEAD), arrays.get(_SHARED)
    config = folder / CONFIG
    has_head = head is not None and (table is None or not equal_bits(head, table))
    scaled = scales_outputs(raw, has_head=has_head, path=config)
    if scaled and has_head:
        raise UserError(
            f"{folder}: {CONFIG} ties the logits to the embeddings, but there is a different "
            f"{_LM_HEAD}; set tie_word_embeddings and scale_decoder_outputs to false if this is a "
            "T5 1.1"
        )
    kept = {name: array for name, array in arrays.items() if not (scaled and name == _LM_HEAD)}
    if not scaled and head is None and table is not None and ties_unscaled(raw, path=config):
        kept[_LM_HEAD] = table
    return scaled, kept
