"""IA3 in PEFT's adapters: scales of outputs ``[out, 1]`` and of inputs ``[1, in]``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prompt_tuning_jax.checkpoints.peft.modules import (
    TheirLinear,
    adapter_path,
    matching_layers,
    module_names,
    paths_of,
    patterns_for,
    require_parts,
)
from prompt_tuning_jax.config.methods import IA3
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.param_tree import require_same_names
from prompt_tuning_jax.typing import HostArray

SCALE = "ia3_l"


def read_ia3(
    arrays: Mapping[str, Mapping[str, HostArray]],
    layers: Mapping[str, TheirLinear],
    file: Path,
) -> tuple[IA3, dict[str, HostArray]]:
    """Returns the method and its arrays by path; errors are those of ``read_peft_weights``."""
    trainable: dict[str, HostArray] = {}
    behind: list[str] = []
    before: list[str] = []
    for name, parts in arrays.items():
        layer = layers[name]
        # PEFT scales the input of feed-forward modules, with a row vector.
        is_row = SCALE in parts and parts[SCALE].shape == (1, layer.inputs)
        shape = (1, layer.inputs) if is_row else (layer.outputs, 1)
        require_parts(layer, parts, {SCALE: shape}, file)
        scale = parts[SCALE].reshape(-1)
        for path, outputs in layer.parts.items():
            (before if is_row else behind).append(path)
            part = "scale_D" if is_row else "scale_F"
            trainable[adapter_path(path, part)] = scale if is_row else scale[outputs]
    usual, paths = IA3(), paths_of(layers)
    method = IA3(
        outputs=patterns_for(behind, paths, usual=usual.outputs),
        inputs=patterns_for(before, paths, usual=usual.inputs),
    )
    return method, trainable


def written_ia3(
    method: IA3, arrays: Mapping[str, HostArray], layers: Mapping[str, TheirLinear]
) -> tuple[dict[str, Any], dict[str, HostArray]]:
    """Returns the fields and the arrays of an adapter.

    Errors are those of ``write_peft_weights``.
    """
    paths = paths_of(layers)
    behind, before = matching_layers(method.outputs, paths), matching_layers(method.inputs, paths)
    wanted = [adapter_path(path, "scale_F") for path in behind]
    wanted += [adapter_path(path, "scale_D") for path in before]
    require_same_names(arrays, dict.fromkeys(wanted), of="the tuned arrays", and_of="IA3")
    theirs: dict[str, HostArray] = {}
    targets, feedforward = [], []
    for name, layer in layers.items():
        outputs = [path for path in layer.parts if path in behind]
        inputs = [path for path in layer.parts if path in before]
        if inputs:
            scales = [arrays[adapter_path(path, "scale_D")] for path in inputs]
            same = all(np.array_equal(scale, scales[0]) for scale in scales)
            if outputs or len(inputs) < len(layer.parts) or not same:
                raise UserError(
                    f"transformers' {name} is {', '.join(layer.parts)} in one, and PEFT has one "
                    "scale of its inputs: give these layers the same one, or scale their outputs"
                )
            theirs[layer.array(SCALE)] = scales[0][None]
            feedforward.append(name)
        elif outputs:
            scale_F = np.ones(layer.outputs, np.float32)
            for path in outputs:
                scale_F[layer.parts[path]] = arrays[adapter_path(path, "scale_F")]
            theirs[layer.array(SCALE)] = scale_F[:, None]
            targets.append(name)
    fields = {
        "feedforward_modules": module_names(feedforward, layers),
        "init_ia3_weights": True,
        "peft_type": "IA3",
        "target_modules": [*module_names(targets, layers), *module_names(feedforward, layers)],
    }
    return fields, theirs
