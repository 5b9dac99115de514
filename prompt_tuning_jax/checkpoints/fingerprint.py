"""Fingerprints of frozen models, so that a prompt is used with the model it was trained for."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from prompt_tuning_jax.checkpoints.lazy_arrays import LazyArray
from prompt_tuning_jax.models.config import ModelConfig
from prompt_tuning_jax.typing import Array, HostArray

# Sampled positions along each axis of each parameter.
_POSITIONS = 8


def fingerprint(config: ModelConfig, params: Mapping[str, Array | HostArray]) -> str:
    """Returns sixteen hex digits that identify a frozen model.

    ``params`` are its frozen parameters.

    This is a hash of the configuration, of every parameter's name and shape, and of an evenly
    spaced sample of every parameter (at most 8 positions along each axis), rounded to bfloat16.  It
    does not depend on the dtype (float32 or bfloat16) or on the sharding, takes a few hundred small
    reads even for XXL, and misses changes outside the sample.  Fields of the configuration with
    their default value are left out, so that adding a field does not change fingerprints.
    """
    return fingerprint_of_samples(config, {name: sample(array) for name, array in params.items()})


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The part of an array that the fingerprint depends on: its shape, and entries as bfloat16."""

    shape: tuple[int, ...]
    bits: bytes


def sample(array: Array | HostArray) -> Sample:
    """Returns the sample of one array, for models whose arrays are not all in memory at once."""
    return Sample(shape=tuple(array.shape), bits=_sample(array).tobytes())


def sample_lazy(array: LazyArray) -> Sample:
    """Returns the sample of an array that has not been read, of which little is read."""
    starts, steps = _grid(array.shape)
    rows = range(*_slices(starts[:1], steps[:1])[0].indices(array.shape[0]))
    rest = (slice(None),) * (len(array.shape) - 1)
    read = np.concatenate([array.read((slice(row, row + 1), *rest)) for row in rows])
    bits = _bits(read[(slice(None), *_slices(starts[1:], steps[1:]))])
    return Sample(shape=tuple(array.shape), bits=bits.tobytes())


def fingerprint_of_samples(config: ModelConfig, samples: Mapping[str, Sample]) -> str:
    """Returns ``fingerprint`` from samples of all parameters, by name."""
    digest = hashlib.sha256(
        json.dumps(_described(config), sort_keys=True, default=_described).encode()
    )
    for name in sorted(samples):
        digest.update(f"\n{name} {list(samples[name].shape)}\n".encode())
        digest.update(samples[name].bits)
    return digest.hexdigest()[:16]


def _described(config: Any) -> dict[str, Any]:
    fields = dataclasses.fields(config)
    values = {field.name: getattr(config, field.name) for field in fields}
    return {f.name: values[f.name] for f in fields if values[f.name] != f.default}


def _sample(array: Array | HostArray) -> HostArray:
    """Returns evenly spaced entries as the bits of bfloat16."""
    starts, steps = _grid(array.shape)
    if isinstance(array, jax.Array) and not _in_host_memory(array):
        # Only the sample leaves the devices, and every process gets all of it.
        sharding = array.sharding
        replicated = None
        if isinstance(sharding, NamedSharding):
            replicated = NamedSharding(sharding.mesh, PartitionSpec())
        array = _sampler(starts, steps, replicated)(array)
        return _bits(np.asarray(array))
    return _bits(np.asarray(array)[_slices(starts, steps)])


def _grid(shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the first sampled position of each axis, and the distance of the next."""
    # From the middle of each stretch: the first rows of an embedding table are special tokens.
    steps = tuple(max(1, n // _POSITIONS) for n in shape)
    return tuple(step // 2 for step in steps), steps


def _bits(part: HostArray) -> HostArray:
    import ml_dtypes

    return np.ascontiguousarray(part, ml_dtypes.bfloat16).view(np.uint16)


def _in_host_memory(array: jax.Array) -> bool:
    """Returns whether NumPy can read the array without a copy."""
    devices: set[jax.Device] = array.sharding.device_set
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


def _slices(starts: tuple[int, ...], steps: tuple[int, ...]) -> tuple[slice, ...]:
    pairs = zip(starts, steps, strict=True)
    return tuple(slice(start, start + _POSITIONS * step, step) for start, step in pairs)


@cache
def _sampler(
    starts: tuple[int, ...], steps: tuple[int, ...], replicated: NamedSharding | None
) -> Any:
    """Returns a jitted sampler, compiled once per shape; a model has about ten."""
    return jax.jit(lambda array: array[_slices(starts, steps)], out_shardings=replicated)
