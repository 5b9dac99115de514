"""Reads and writes T5 1.0 and 1.1, mT5 and UMT5 as Hugging Face folders.

A folder holds ``config.json``, weights (``hf_weights`` says in which files) and a vocabulary.  The
names and layouts are those of transformers' modeling_t5.py; torch keeps kernels as [out, in], and
they are [in, out] here.
"""

import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, Literal

import numpy as np

from prompt_tuning_jax.checkpoints.hf.config import (
    CONFIG,
    VOCABULARY,
    config_from,
    config_to,
    model_type_of,
    read_config,
    scales_outputs,
    ties_unscaled,
    tokenizer_files,
)
from prompt_tuning_jax.checkpoints.hf.index import write_folder
from prompt_tuning_jax.checkpoints.hf.weights import open_weights
from prompt_tuning_jax.checkpoints.lazy import LazyArray
from prompt_tuning_jax.checkpoints.names import EMBEDDING, LOGITS, RELPOS, parameter_shapes
from prompt_tuning_jax.data.vocabularies.hf_tokenizer import vocabulary_file as find_vocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.t5.config import T5Config
from prompt_tuning_jax.typing import Array, HostArray

__all__ = ["VOCABULARY", "hf_name", "model_type_of", "open_hf", "read_hf", "write_hf"]

_SHARED = "shared.weight"
_LM_HEAD = "lm_head.weight"
COPIES_OF_SHARED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# Files of T5 1.0 carry a bias that cross attention never uses.
_DEAD = re.compile(
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
_COMPARED_BYTES = 1 << 26
_PROJECTIONS = {"query": "q", "key": "k", "value": "v", "out": "o"}


_LAYER = re.compile(r"(?:encoder|decoder)\.block\.\d+")


def open_hf(folder: str | Path) -> tuple[T5Config, dict[str, LazyArray], Path | None]:
    """A model as (configuration, parameters by T5X name in the stored dtype, vocabulary file).

    Headers alone are read, and where there are copies of the embedding table, these.  Every array
    of the folder has one use and every parameter one source, or UserError lists what is left over
    on both sides; copies must be copies.  The vocabulary file is for ``load_vocabulary``.
    """
    from prompt_tuning_jax.param_tree import require_same_names

    folder = Path(folder)
    raw = read_config(folder / CONFIG)
    path, arrays = open_weights(folder)
    arrays = {name: array for name, array in arrays.items() if not _DEAD.fullmatch(name)}
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
            f"{path} has no arrays of {', '.join(missing)}, and by {CONFIG} (num_layers, "
            "num_decoder_layers) the model has them: the copy is incomplete or the config another's"
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
                f"and by {CONFIG} it is {list(shapes[name])}"
            )
    return config, params, find_vocabulary(folder)


def _require_possible_layers(
    config: T5Config, layers: Set[str], *, arrays: int, path: Path
) -> None:
    """UserError for more layers than the file has arrays, before any of them is described."""
    for stack, number in (
        ("encoder", config.num_encoder_layers),
        ("decoder", config.num_decoder_layers),
    ):
        if number > arrays:
            held = sum(layer.startswith(stack) for layer in layers)
            raise UserError(
                f"{path} holds {held} {stack} layers, and by {CONFIG} (num_layers, "
                f"num_decoder_layers) the model has {number}: the config is another's or damaged"
            )


def read_hf(folder: str | Path) -> tuple[T5Config, dict[str, HostArray], Path | None]:
    """``open_hf`` with the arrays read, each one contiguous."""
    config, params, vocabulary = open_hf(folder)
    read = {name: np.ascontiguousarray(array.whole()) for name, array in params.items()}
    return config, read, vocabulary


def write_hf(
    folder: str | Path,
    config: T5Config,
    params: Mapping[str, Array | HostArray | LazyArray],
    *,
    vocabulary_file: str | Path | None = None,
    dtype: Literal["float32", "bfloat16", "float16", "stored"] = "bfloat16",
    max_shard_bytes: int = 5_000_000_000,
    model_type: str = "t5",
) -> None:
    """Writes a model as a folder that transformers loads, with its tokenizer if there is one.

    ``params`` are by T5X name and must be exactly those of ``config``; they are read and written
    shard by shard.  What is written reads back bit for bit, as ``stored`` in each array's own
    dtype.  Weights of more than ``max_shard_bytes`` go into several files with an index.  The
    folder is written aside and renamed; in an existing one, safetensors files of an earlier model
    go and other files stay.  ``model_type`` "mt5" (``model_type_of`` the folder that was read)
    writes an mT5 as one, which else is written as the T5 1.1 that it is; biases per layer make a
    UMT5 whatever it says.
    """
    from prompt_tuning_jax.checkpoints.names import require_parameters

    require_parameters(params, config, of="the parameters")
    arrays = {hf_name(name): _as_torch_lays_it(name, array) for name, array in params.items()}
    write_folder(
        Path(folder),
        arrays,
        describe=lambda stored: config_to(config, stored, model_type=model_type),
        tokenizer=tokenizer_files(vocabulary_file, config) if vocabulary_file else {},
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
    )


def hf_name(name: str) -> str:
    """What transformers calls a parameter.

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


def _as_torch_lays_it(name: str, array: Array | HostArray | LazyArray) -> LazyArray:
    if not isinstance(array, LazyArray):
        held = array
        array = LazyArray(
            shape=held.shape,
            dtype=np.dtype(held.dtype),
            where=name,
            read=lambda index: np.asarray(held)[index],
        )
    return array.transposed() if _is_transposed(name) else array


def _without_copies(arrays: Mapping[str, LazyArray], *, path: Path) -> dict[str, LazyArray]:
    """The arrays with the embedding table once, by its own name."""
    tables = [name for name in (_SHARED, *COPIES_OF_SHARED) if name in arrays]
    if not tables:
        return dict(arrays)
    for name in tables[1:]:
        if not _equal(arrays[name], arrays[tables[0]]):
            raise UserError(f"{path}: {name} is not a copy of {tables[0]}")
    rest = {name: array for name, array in arrays.items() if name not in tables}
    return {_SHARED: arrays[tables[0]], **rest}


def _with_head(
    raw: Mapping[str, Any], arrays: Mapping[str, LazyArray], *, folder: Path
) -> tuple[bool, dict[str, LazyArray]]:
    """Whether the logits are the scaled decoder output times the table (T5 1.0), and the arrays.

    Tied models lose a head that is a copy; those that use the table unscaled get it as their head.
    """
    head, table = arrays.get(_LM_HEAD), arrays.get(_SHARED)
    config = folder / CONFIG
    own_head = head is not None and (table is None or not _equal(head, table))
    scaled = scales_outputs(raw, own_head=own_head, path=config)
    if scaled and own_head:
        raise UserError(
            f"{folder} contradicts itself: {CONFIG} ties the logits to the embeddings, and "
            f"there is an {_LM_HEAD} of its own; set tie_word_embeddings and "
            "scale_decoder_outputs to false if this is a T5 1.1"
        )
    kept = {name: array for name, array in arrays.items() if not (scaled and name == _LM_HEAD)}
    if not scaled and head is None and table is not None and ties_unscaled(raw, path=config):
        kept[_LM_HEAD] = table
    return scaled, kept


def _equal(left: LazyArray, right: LazyArray) -> bool:
    """Bit for bit, some rows at a time."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    row_bytes = max(1, left.dtype.itemsize * int(np.prod(left.shape[1:])))
    rows = max(1, _COMPARED_BYTES // row_bytes)
    rest = (slice(None),) * (len(left.shape) - 1)
    return all(
        left.read((slice(start, start + rows), *rest)).tobytes()
        == right.read((slice(start, start + rows), *rest)).tobytes()
        for start in range(0, left.shape[0] if left.shape else 0, rows)
    )
