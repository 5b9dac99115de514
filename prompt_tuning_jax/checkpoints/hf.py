"""Reads and writes T5 1.0 and 1.1 as Hugging Face folders.

A folder holds ``config.json``, ``model.safetensors`` and, unless its model reads bytes,
``spiece.model``.  The names and layouts are those of transformers' modeling_t5.py; torch keeps
kernels as [out, in], and they are [in, out] here.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from prompt_tuning_jax.checkpoints.atomic import folder_written_aside
from prompt_tuning_jax.checkpoints.hf_config import (
    CONFIG,
    config_from,
    config_to,
    read_config,
    tokenizer_config,
)
from prompt_tuning_jax.checkpoints.names import EMBEDDING, LOGITS, parameter_shapes
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.config import T5Config
from prompt_tuning_jax.typing import Array, HostArray

WEIGHTS = "model.safetensors"
VOCABULARY = "spiece.model"

_SHARED = "shared.weight"
_LM_HEAD = "lm_head.weight"
_COPIES_OF_SHARED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# Files of T5 1.0 carry a bias that cross attention never uses.
_DEAD = re.compile(
    r"decoder\.block\.\d+\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
)
_SUBLAYERS = {
    "encoder/pre_attention_layer_norm": "layer.0.layer_norm",
    "encoder/attention": "layer.0.SelfAttention",
    "encoder/pre_mlp_layer_norm": "layer.1.layer_norm",
    "encoder/mlp": "layer.1.DenseReluDense",
    "decoder/pre_self_attention_layer_norm": "layer.0.layer_norm",
    "decoder/self_attention": "layer.0.SelfAttention",
    "decoder/pre_cross_attention_layer_norm": "layer.1.layer_norm",
    "decoder/encoder_decoder_attention": "layer.1.EncDecAttention",
    "decoder/pre_mlp_layer_norm": "layer.2.layer_norm",
    "decoder/mlp": "layer.2.DenseReluDense",
}
_PROJECTIONS = {"query": "q", "key": "k", "value": "v", "out": "o"}


def read_hf(folder: str | Path) -> tuple[T5Config, dict[str, HostArray], Path | None]:
    """A model as (configuration, parameters by T5X name in the stored dtype, vocabulary file).

    Every array of the file is used once and every parameter has one source, or UserError lists what
    is left over on both sides; copies of the embedding table must be copies.
    """
    from safetensors import SafetensorError, safe_open

    from prompt_tuning_jax.tree import require_same_names

    folder = Path(folder)
    raw = read_config(folder / CONFIG)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise UserError(f"{folder} has no {WEIGHTS} (one file; no shards, no pickles)")
    try:
        with safe_open(weights, framework="numpy") as file:
            names = set(file.keys())
            names -= {name for name in names if _DEAD.fullmatch(name)}
            tied = _is_tied(raw, file, names=names, folder=folder)
            names -= {_LM_HEAD} if tied else set()
            names -= _copies_of_shared(file, names=names, path=weights)
            config = config_from(raw, tied=tied, path=folder / CONFIG)
            shapes = parameter_shapes(config)
            ours = {_hf_name(name): name for name in shapes}
            require_same_names(dict.fromkeys(names), ours, of=str(weights), and_of=CONFIG)
            params = {}
            for theirs, name in ours.items():
                array = _to_ours(name, file.get_tensor(theirs))
                if array.shape != shapes[name]:
                    raise UserError(
                        f"{weights}: {theirs} makes {name} {list(array.shape)}, "
                        f"and by {CONFIG} it is {list(shapes[name])}"
                    )
                params[name] = array
    except (SafetensorError, OSError) as error:
        raise UserError(f"{weights} is damaged or not a safetensors file: {error}") from error
    vocabulary = folder / VOCABULARY
    return config, params, vocabulary if vocabulary.is_file() else None


def write_hf(
    folder: str | Path,
    config: T5Config,
    params: Mapping[str, Array | HostArray],
    *,
    vocabulary_file: str | Path | None = None,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
) -> None:
    """Writes a model as a folder that transformers loads, with its tokenizer if there is one.

    ``params`` are by T5X name and must be exactly those of ``config``; float32 reads back bit for
    bit.  The folder is written aside and renamed; other files in an existing one stay.
    """
    import ml_dtypes
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    from prompt_tuning_jax.checkpoints.names import require_parameters

    folder = Path(folder)
    kinds = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
    if dtype not in kinds:
        raise UserError(f"weights are written as float32 or bfloat16, not as {dtype!r}")
    require_parameters(params, config, of="the parameters")
    described = config_to(config, dtype)
    tokenizer = tokenizer_config(vocabulary_file, config) if vocabulary_file else None
    # safetensors writes the memory as it lies, whatever the strides say.
    arrays = {
        _hf_name(name): np.ascontiguousarray(_transposed(name, np.asarray(array)), kinds[dtype])
        for name, array in params.items()
    }
    with folder_written_aside(folder) as aside:
        _write_json(aside / CONFIG, described)
        try:
            save_file(arrays, aside / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        # safetensors lets the owner alone read what it writes.
        shutil.copymode(aside / CONFIG, aside / WEIGHTS)
        if vocabulary_file and tokenizer:
            shutil.copyfile(vocabulary_file, aside / VOCABULARY)
            _write_json(aside / "tokenizer_config.json", tokenizer)


def _hf_name(name: str) -> str:
    """encoder/layers_3/mlp/wo/kernel -> encoder.block.3.layer.1.DenseReluDense.wo.weight."""
    if name in (EMBEDDING, LOGITS):
        return _SHARED if name == EMBEDDING else _LM_HEAD
    stack, block, *rest = name.split("/")
    if block == "relpos_bias":
        return f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    if block == f"{stack}_norm":
        return f"{stack}.final_layer_norm.weight"
    sublayer, *projection = rest[:-1]
    parts = [stack, "block", block.removeprefix("layers_"), _SUBLAYERS[f"{stack}/{sublayer}"]]
    parts += [_PROJECTIONS.get(p, p) for p in projection]
    return ".".join([*parts, "weight"])


def _transposed(name: str, array: HostArray) -> HostArray:
    return array.T if name.endswith(("/kernel", "/rel_embedding")) else array


def _to_ours(name: str, array: HostArray) -> HostArray:
    return np.ascontiguousarray(_transposed(name, array))


def _is_tied(raw: Mapping[str, Any], file: Any, *, names: set[str], folder: Path) -> bool:
    """Whether logits are the scaled decoder output times the embedding table (T5 1.0).

    transformers 5 writes ``tie_word_embeddings: true`` for every T5 and says with
    ``scale_decoder_outputs`` what 4.x said with that flag; its mT5 never scales.
    """
    scaled = raw["model_type"] != "mt5" and raw.get(
        "scale_decoder_outputs", raw.get("tie_word_embeddings", True)
    )
    if not isinstance(scaled, bool):
        raise UserError(f"{folder / CONFIG}: tie_word_embeddings must be true or false")
    own_head = _LM_HEAD in names and not (_SHARED in names and _equal(file, _LM_HEAD, _SHARED))
    if scaled and own_head:
        raise UserError(
            f"{folder} contradicts itself: {CONFIG} ties the logits to the embeddings, and "
            f"{WEIGHTS} has an {_LM_HEAD} of its own; set tie_word_embeddings and "
            "scale_decoder_outputs to false if this is a T5 1.1"
        )
    return scaled


def _copies_of_shared(file: Any, *, names: set[str], path: Path) -> set[str]:
    copies = {name for name in _COPIES_OF_SHARED if name in names}
    for name in sorted(copies):
        if _SHARED not in names or not _equal(file, name, _SHARED):
            raise UserError(f"{path}: {name} is not a copy of {_SHARED}")
    return copies


def _equal(file: Any, left: str, right: str) -> bool:
    a, b = file.get_tensor(left), file.get_tensor(right)
    return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
