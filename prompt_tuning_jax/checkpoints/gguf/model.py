"""Opens a GGUF file as a decoder-only model under this project's parameter names."""

import dataclasses
from collections import Counter
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
from prompt_tuning_jax.checkpoints.gguf.tensors import open_tensors, same_bytes, stored_type
from prompt_tuning_jax.checkpoints.lazy_arrays import Index, LazyArray
from prompt_tuning_jax.data.vocabularies.gguf_metadata import read_header
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.causal_lm.config import CausalLMConfig
from prompt_tuning_jax.typing import HostArray
from prompt_tuning_jax.untrusted_input import require_whole

_TABLE, _HEAD = "token_embd.weight", "output.weight"


def open_gguf(path: str | Path) -> tuple[CausalLMConfig, dict[str, LazyArray]]:
    """A model as (configuration, parameters by our name).

    Quantised tensors are dequantised to float32, part by part, when they are read; F16 and BF16
    keep their type.  The file is also the model's vocabulary.  Raises UserError for a damaged or
    truncated file, an unknown architecture, and types that cannot be dequantised.
    """
    from prompt_tuning_jax.param_tree import require_same_names

    path = Path(path)
    require_whole(path)
    values, infos = read_header(path)
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
    held = {name: tensor for name, tensor in tensors.items() if not table.is_unused(name)}
    if copied:
        del held[_HEAD]
    if config.num_layers > len(held):
        raise UserError(
            f"{path} has {len(held)} tensors, which are too few for {config.num_layers} layers"
        )
    shapes = causal_parameter_shapes(config)
    theirs = {name: table.tensor(name) for name in shapes}
    require_same_names(
        held, dict.fromkeys(theirs.values()), of=str(path), and_of=f"a {metadata.architecture}"
    )
    params: dict[str, LazyArray] = {}
    for name, source in theirs.items():
        tensor = held[source]
        if architecture.norms_plus_one and name.endswith("norm/scale"):
            tensor = _minus_one(tensor)
        width = shapes[name][-1]
        turned = architecture.permuted and ("/query/" in name or "/key/" in name)
        if turned and tensor.shape[0] == width:  # otherwise, a message tells the shapes
            order = permutation(width // config.head_dim, config.head_dim)
            tensor = tensor.taken(order, axis=0)
        params[name] = table.read(name, tensor, shapes, config.head_dim)
        if params[name].shape != shapes[name]:
            raise UserError(
                f"{path}: {source} makes {name} {list(params[name].shape)}, but by the metadata it "
                f"is {list(shapes[name])}"
            )
    return config, params


def stored_types(path: Path) -> tuple[Counter[str], int]:
    """The number of parameters of each type in a file that was opened, and the bytes of all."""
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
