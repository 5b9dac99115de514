"""Opens a GGUF file as a decoder-only model under this project's parameter names."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import numpy as np

from prompt_tuning_jax.checkpoints.causal_parameters import causal_parameter_shapes
from prompt_tuning_jax.checkpoints.gguf.architectures import (
    ARCHITECTURES,
    Metadata,
    config_of,
    permutation,
)
from prompt_tuning_jax.checkpoints.gguf.tensors import (
    PLAIN_TYPES,
    StoredBlocks,
    open_blocks,
    open_tensors,
    same_bytes,
    stored_type,
)
from prompt_tuning_jax.checkpoints.lazy_arrays import Index, LazyArray
from prompt_tuning_jax.data.vocabularies.gguf_metadata import read_header
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.causal_lm.config import CausalLMConfig
from prompt_tuning_jax.models.quantization import is_quantizable
from prompt_tuning_jax.typing import HostArray
from prompt_tuning_jax.untrusted_input import require_whole

_TABLE, _HEAD = "token_embd.weight", "output.weight"


@dataclass(frozen=True, kw_only=True)
class GGUFModel:
    """A model in a GGUF file.

    Attributes:
      config: its configuration.
      params: its parameters by our name, in floating point.
      blocks: those that the file stores in blocks of integers that may be kept; ours are the
        transposes of a file's kernels.
      dequantized: the number of weights of each other quantized type.
    """

    config: CausalLMConfig
    params: dict[str, LazyArray]
    blocks: dict[str, StoredBlocks]
    dequantized: Mapping[str, int]


def open_gguf(path: str | Path) -> tuple[CausalLMConfig, dict[str, LazyArray]]:
    """Returns a model as (configuration, parameters by our name); see ``open_gguf_model``."""
    checkpoint = open_gguf_model(path)
    return checkpoint.config, checkpoint.params


def open_gguf_model(path: str | Path) -> GGUFModel:
    """Opens a model in a GGUF file.

    Quantized tensors are dequantized to float32, part by part, when they are read; F16 and BF16
    keep their type.  The file is also the model's vocabulary.  Raises UserError for a damaged or
    truncated file, an unknown architecture, and types that cannot be dequantized.
    """
    from prompt_tuning_jax.param_tree import require_same_names

    path = Path(path)
    require_whole(path)
    values, infos = read_header(path)
    parts = values.get("split.count", 1)
    if parts != 1:
        raise UserError(
            f"{path} is one of {parts} parts of a model: join them with llama-gguf-split --merge"
        )
    if _TABLE not in infos:
        raise UserError(f"{path} has no {_TABLE}: it is not a language model")
    tensors = open_tensors(path, infos)
    metadata = Metadata(values, tensors, path)
    architecture = ARCHITECTURES[metadata.architecture]
    table = architecture.names
    config = config_of(metadata)
    # The head is tied if there is none, or if it is a copy of the embedding table.
    copied = _HEAD in infos and same_bytes(path, infos[_HEAD], infos[_TABLE])
    config = dataclasses.replace(config, tie_embeddings=copied or _HEAD not in infos)
    used = {name: tensor for name, tensor in tensors.items() if not table.is_unused(name)}
    if copied:
        del used[_HEAD]
    if config.num_layers > len(used):
        raise UserError(
            f"{path} has {len(used)} tensors, which are too few for {config.num_layers} layers"
        )
    shapes = causal_parameter_shapes(config)
    theirs = {name: table.tensor(name) for name in shapes}
    require_same_names(
        used, dict.fromkeys(theirs.values()), of=str(path), and_of=f"a {metadata.architecture}"
    )

    def ours(tensor: LazyArray, name: str) -> LazyArray:
        """Returns our parameter from a tensor, or from an array with its rows."""
        width = shapes[name][-1]
        turned = architecture.permuted and ("/query/" in name or "/key/" in name)
        if turned and tensor.shape[0] == width:  # otherwise, a message tells the shapes
            order = permutation(width // config.head_dim, config.head_dim)
            tensor = tensor.taken(order, axis=0)
        return table.read(name, tensor, shapes, config.head_dim)

    params: dict[str, LazyArray] = {}
    blocks: dict[str, StoredBlocks] = {}
    dequantized: Counter[str] = Counter()
    for name, source in theirs.items():
        tensor = used[source]
        if architecture.norms_plus_one and name.endswith("norm/scale"):
            tensor = _minus_one(tensor)
        params[name] = ours(tensor, name)
        if params[name].shape != shapes[name]:
            raise UserError(
                f"{path}: {source} makes {name} {list(params[name].shape)}, but by the metadata it "
                f"is {list(shapes[name])}"
            )
        kept = open_blocks(path, source, infos[source]) if is_quantizable(name) else None
        if kept is not None:
            blocks[name] = kept.mapped(partial(ours, name=name))
        elif (kind := stored_type(infos[source])[0]) not in PLAIN_TYPES:
            dequantized[kind] += prod(params[name].shape)
    return GGUFModel(config=config, params=params, blocks=blocks, dequantized=dequantized)


def stored_types(path: Path) -> tuple[Counter[str], int]:
    """Returns the number of parameters of each type in an opened file, and the bytes of all."""
    types: Counter[str] = Counter()
    size = 0
    for info in read_header(path)[1].values():
        kind, stored = stored_type(info)
        types[kind] += prod(info.shape)
        size += stored
    return types, size


def _minus_one(tensor: LazyArray) -> LazyArray:
    def read(index: Index) -> HostArray:
        return np.asarray(tensor.read(index) - np.ones((), tensor.dtype))

    return dataclasses.replace(tensor, read=read)
