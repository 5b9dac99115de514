"""Reads checkpoints in T5X's own format, version 3 (t5x/checkpoints.py at cc342d4).

A folder holds a msgpack index ``checkpoint`` and one zarr array per large leaf.  In the index a
leaf is either the array itself or the TensorStore spec of a zarr array beside it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prompt_tuning_jax.checkpoints.names import (
    DECODER_RELPOS,
    EMBEDDING,
    ENCODER_RELPOS,
    LOGITS,
    require_parameters,
)
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.config import T5Config
from prompt_tuning_jax.typing import HostArray

INDEX = "checkpoint"
VERSION = 3
# Where the original prompt tuning code keeps its prompt [P,D] among the model's parameters.
PROMPT = "encoder/prompt/prompt/prompt"


def read_t5x(folder: str | Path) -> dict[str, HostArray]:
    """The parameters in a T5X checkpoint by name, e.g. ``encoder/encoder_norm/scale``, as stored.

    The optimizer's state is left alone.  A prompt, if one was trained, is at ``PROMPT``.  Raises
    UserError for a missing or damaged index or array, and for arrays outside of the folder.
    """
    folder = Path(folder)
    leaves = _flatten(_entry(_read_index(folder), "target", folder))
    if not leaves:
        raise UserError(f"{folder / INDEX} lists no parameters: it is not a T5X checkpoint")
    return {name: _read_leaf(folder, name, leaf) for name, leaf in sorted(leaves.items())}


def read_t5x_step(folder: str | Path) -> int:
    """The training step at which a T5X checkpoint was saved."""
    folder = Path(folder)
    step = _entry(_entry(_read_index(folder), "state", folder), "step", folder)
    if _is_spec(step):
        step = _read_leaf(folder, "state/step", step)
    if np.ndim(step) or not np.issubdtype(np.asarray(step).dtype, np.integer):
        raise UserError(f"{folder / INDEX} has no whole number as its step")
    return int(step)


def config_of(
    params: Mapping[str, Any],
    *,
    relpos_max_distance: int = 128,
    mlp_activations: tuple[str, ...] | None = None,
) -> T5Config:
    """The configuration of the T5 that ``params`` (by name; only shapes matter) belong to.

    What shapes cannot tell is an argument.  ``mlp_activations`` is T5 1.1's for a gated mlp and T5
    1.0's otherwise.  A prompt at ``PROMPT`` is allowed.  Raises UserError if these are not exactly
    the parameters of one T5.
    """
    of = "the checkpoint"
    vocab_size, embed_dim = _shape(params, EMBEDDING)
    num_heads, num_buckets = _shape(params, ENCODER_RELPOS)
    _shape(params, DECODER_RELPOS)
    _, all_heads = _shape(params, "encoder/layers_0/attention/query/kernel")
    if not num_heads or all_heads % num_heads:
        raise UserError(f"{of} has query kernels of width {all_heads} for {num_heads} heads")
    gated = "encoder/layers_0/mlp/wi_0/kernel" in params
    if mlp_activations is None:
        mlp_activations = ("gelu", "linear") if gated else ("relu",)
    _, mlp_dim = _shape(params, f"encoder/layers_0/mlp/{'wi_0' if gated else 'wi'}/kernel")
    config = T5Config(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_heads=num_heads,
        head_dim=all_heads // num_heads,
        mlp_dim=mlp_dim,
        num_encoder_layers=_count_layers(params, "encoder"),
        num_decoder_layers=_count_layers(params, "decoder"),
        mlp_activations=mlp_activations,
        tie_embeddings=LOGITS not in params,
        relpos_num_buckets=num_buckets,
        relpos_max_distance=relpos_max_distance,
    )
    require_parameters({k: v for k, v in params.items() if k != PROMPT}, config, of=of)
    return config


def _count_layers(params: Mapping[str, Any], stack: str) -> int:
    found = (re.match(rf"{stack}/layers_(\d+)/", name) for name in params)
    return len({match[1] for match in found if match})


def _shape(params: Mapping[str, Any], name: str) -> tuple[int, int]:
    if name not in params:
        raise UserError(f"the checkpoint has no {name}: it is not a T5 with a layer per name")
    shape = tuple(params[name].shape)
    if len(shape) != 2:
        raise UserError(f"{name} has shape {list(shape)} in the checkpoint; it has two in a T5")
    return shape[0], shape[1]


def _read_index(folder: Path) -> Mapping[str, Any]:
    """The index as nested dicts, for the one version that is read here."""
    path = folder / INDEX
    if not path.is_file():
        inside = sorted(p.name for p in folder.glob("checkpoint_*")) if folder.is_dir() else []
        hint = f"did you mean {folder / inside[-1]}?" if inside else "is it a T5X checkpoint?"
        raise UserError(f"{folder} has no index file {INDEX!r}; {hint}")
    from flax import serialization

    try:
        index = serialization.msgpack_restore(path.read_bytes())
    except Exception as error:  # msgpack and numpy raise many kinds for damaged bytes
        raise UserError(f"{path} is damaged or not a T5X index: {_line(error)}") from error
    version = index.get("version") if isinstance(index, Mapping) else None
    if version != VERSION:
        raise UserError(f"{path} is T5X format version {version}; only version {VERSION} is read")
    state: Mapping[str, Any] = _entry(index, "optimizer", folder)
    return state


def _entry(tree: Mapping[str, Any], name: str, folder: Path) -> Any:
    if not isinstance(tree, Mapping) or name not in tree:
        raise UserError(f"{folder / INDEX} has no entry {name!r}: it is not a T5X checkpoint")
    return tree[name]


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, Mapping) and "driver" in leaf and "kvstore" in leaf


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping) or _is_spec(tree):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for name, child in tree.items():
        flat |= _flatten(child, f"{prefix}/{name}" if prefix else str(name))
    return flat


def _read_leaf(folder: Path, name: str, leaf: Any) -> HostArray:
    if isinstance(leaf, np.ndarray):
        return leaf
    if not _is_spec(leaf):
        raise UserError(f"{folder / INDEX}: {name} is neither an array nor the place of one")
    return _read_zarr(_StoredArray.of(leaf, folder=folder, name=name))


@dataclass(frozen=True, kw_only=True)
class _StoredArray:
    """What is taken from a TensorStore spec: nothing else in it is trusted or passed on."""

    name: str
    path: Path
    shape: tuple[int, ...] | None

    @classmethod
    def of(cls, spec: Mapping[str, Any], *, folder: Path, name: str) -> "_StoredArray":
        try:
            where = spec["kvstore"]["path"]
            shape = spec.get("metadata", {}).get("shape")
            # Wherever it was written (gfile, gcs, file), the array is beside the index now.
            path = (folder / where).resolve()
            known = None if shape is None else tuple(int(n) for n in shape)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{folder / INDEX}: the place of {name} is not readable") from error
        if spec["driver"] != "zarr":
            raise UserError(f"{folder / INDEX}: {name} is stored as {spec['driver']!r}, not zarr")
        if not path.is_relative_to(folder.resolve()) or path == folder.resolve():
            raise UserError(f"{folder / INDEX}: {name} is at {where!r}, outside of the folder")
        if not path.is_dir():
            raise UserError(f"{folder} has no folder {where!r} for {name}: the copy is incomplete")
        return cls(name=name, path=path, shape=known)


def _read_zarr(stored: _StoredArray) -> HostArray:
    import tensorstore

    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{stored.path}/"},
        # Otherwise a lost chunk would be read as zeros.
        "fill_missing_data_reads": False,
    }
    try:
        array = tensorstore.open(spec, read=True, open=True).result()
        if stored.shape is not None and tuple(array.shape) != stored.shape:
            raise UserError(
                f"{stored.path} holds {list(array.shape)} for {stored.name}, "
                f"and the index says {list(stored.shape)}"
            )
        return np.asarray(array.read().result())
    except (ValueError, OSError, NotImplementedError) as error:
        raise UserError(
            f"{stored.path} is damaged or incomplete for {stored.name}: {_line(error)}"
        ) from error


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
