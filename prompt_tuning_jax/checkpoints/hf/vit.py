"""Reads and writes vision transformers as Hugging Face folders."""

import re
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np

from prompt_tuning_jax.checkpoints.hf.config_files import CONFIG
from prompt_tuning_jax.checkpoints.hf.config_reader import ConfigReader
from prompt_tuning_jax.checkpoints.hf.config_writer import ConfigWriter
from prompt_tuning_jax.checkpoints.hf.families.vit import (
    ARCHITECTURE,
    PREFIX,
    UNUSED,
    WITHOUT_CLASSIFIER,
    describe_vit,
    tensor_shapes,
)
from prompt_tuning_jax.checkpoints.hf.image_processor import (
    PREPROCESSOR_CONFIG,
    described_processing,
    read_processing,
)
from prompt_tuning_jax.checkpoints.hf.index import HfModel, with_dtype
from prompt_tuning_jax.checkpoints.hf.weights import open_weights
from prompt_tuning_jax.checkpoints.lazy_arrays import LazyArray
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.vit.config import ViTConfig

_CLASSIFIER = "classifier.weight"
_MOST_LABELS = 100_000
_MOST_PIXELS = 2**14  # height and width of an image


def open_vit(folder: Path, raw: Mapping[str, Any]) -> tuple[ViTConfig, dict[str, LazyArray]]:
    """Returns a model as (configuration, parameters by our name in the stored dtype).

    A folder without a classifier is a model without labels.  See ``open_hf`` for the errors.
    """
    from prompt_tuning_jax.param_tree import require_same_names

    path, stored = open_weights(
        folder, is_unused=lambda name: re.fullmatch(UNUSED, name) is not None, flax=False
    )
    config = vit_config(raw, folder / CONFIG, classes=_classes(stored, path))
    prefix = PREFIX if config.labels else ""
    tensors = {_with_prefix(name, prefix): array for name, array in stored.items()}
    table = tensor_shapes(config)
    wanted = {theirs: None for theirs, _ in table.values()}
    require_same_names(tensors, wanted, of=str(path), and_of=CONFIG)
    for theirs, shape in table.values():
        if tensors[theirs].shape != shape:
            raise UserError(
                f"{path}: {theirs} is {list(tensors[theirs].shape)}, but by {CONFIG} it is "
                f"{list(shape)}"
            )
    return config, {name: _ours(name, tensors[theirs]) for name, (theirs, _) in table.items()}


def vit_as_hf(config: ViTConfig, params: Mapping[str, LazyArray]) -> HfModel:
    """Returns a model as transformers has it."""
    writer = ConfigWriter(cast(Any, config))  # which reads the fields of any model's configuration
    describe_vit(writer)
    architecture = ARCHITECTURE if config.labels else WITHOUT_CLASSIFIER
    described: dict[str, Any] = {"architectures": [architecture]}
    if config.labels:
        described["id2label"] = {str(n): label for n, label in enumerate(config.labels)}
        described["label2id"] = {label: n for n, label in enumerate(config.labels)}
    return HfModel(
        arrays={
            theirs: _theirs(name, params[name], shape)
            for name, (theirs, shape) in tensor_shapes(config).items()
        },
        describe=with_dtype({**described, **writer.raw}),
        files={PREPROCESSOR_CONFIG: described_processing(config)},
    )


def vit_config(raw: Mapping[str, Any], path: Path, *, classes: int) -> ViTConfig:
    """Returns the configuration of ``raw``, with as many labels as the classifier has rows."""
    reader = ConfigReader(raw, generation={}, path=path)
    describe_vit(reader)
    values = {name: value for name, value in reader.values.items() if name != "model_type"}
    size, patch = values["image_size"], values["patch_size"]
    if size % patch or size > _MOST_PIXELS:
        raise UserError(
            f"{path}: image_size is {size} and patch_size {patch}; images must be whole patches "
            f"and at most {_MOST_PIXELS} pixels high"
        )
    if values["embed_dim"] % values["num_heads"]:
        raise UserError(
            f"{path}: hidden_size {values['embed_dim']} cannot be divided into "
            f"{values['num_heads']} heads"
        )
    processing = read_processing(path.parent, image_size=size, num_channels=values["num_channels"])
    labels = _labels(raw, path, classes=classes)
    return ViTConfig(**values, vocab_size=classes, labels=labels, processing=processing)


def _labels(raw: Mapping[str, Any], path: Path, *, classes: int) -> tuple[str, ...]:
    """Returns the names of the classes.

    Equal names (ImageNet's cranes) are made different.
    """
    names = raw.get("id2label")
    if names is None:
        return tuple(f"LABEL_{number}" for number in range(classes))
    if not classes:  # transformers writes two labels for every model
        return ()
    wanted = [str(number) for number in range(classes)]
    if not isinstance(names, dict) or {*names} != {*wanted}:
        raise UserError(
            f"{path}: id2label does not name the classes 0 to {classes - 1}, which the classifier "
            "has"
        )
    labels = [names[number] for number in wanted]
    wrong = next((label for label in labels if not isinstance(label, str) or not label), None)
    if wrong is not None:
        raise UserError(f"{path}: id2label has {wrong!r}; a label is a text")
    counts = Counter(labels)
    return tuple(
        f"{label} ({number})" if counts[label] > 1 else label for number, label in enumerate(labels)
    )


def _classes(stored: Mapping[str, LazyArray], path: Path) -> int:
    if _CLASSIFIER not in stored:
        return 0
    shape = stored[_CLASSIFIER].shape
    if len(shape) != 2 or not 0 < shape[0] <= _MOST_LABELS:
        raise UserError(f"{path}: {_CLASSIFIER} is {list(shape)}; it must be [classes, width]")
    return shape[0]


def _with_prefix(name: str, prefix: str) -> str:
    return name if name.startswith("classifier.") else prefix + name.removeprefix(PREFIX)


def _ours(name: str, array: LazyArray) -> LazyArray:
    if name.endswith("/kernel"):
        outputs = array.shape[0]
        return _reshaped(array, (outputs, prod(array.shape[1:]))).transposed()
    if name in ("cls_token", "position_embedding"):
        return _reshaped(array, array.shape[1:])
    return array


def _theirs(name: str, array: LazyArray, shape: tuple[int, ...]) -> LazyArray:
    return _reshaped(array.transposed() if name.endswith("/kernel") else array, shape)


def _reshaped(array: LazyArray, shape: tuple[int, ...]) -> LazyArray:
    """Returns the array in another shape, read as a whole unless its shape stays."""
    if array.shape == shape:
        return array
    return LazyArray(
        shape=shape,
        dtype=array.dtype,
        where=array.where,
        read=lambda index: np.ascontiguousarray(array.whole()).reshape(shape)[index],
    )
