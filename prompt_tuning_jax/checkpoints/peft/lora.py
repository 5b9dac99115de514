"""LoRA in PEFT's adapters.

A fused projection of transformers' model is several layers of ours, which share its first matrix
and split the rows of its second.  Pairs that were trained here have a first matrix each.  They are
written as one pair of a higher rank, whose second matrix is zero outside their blocks::

    A = [A_q; A_k]      B = [[B_q, 0], [0, B_k]]
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prompt_tuning_jax.checkpoints.peft.adapter_file import shown
from prompt_tuning_jax.checkpoints.peft.modules import (
    TheirLinear,
    adapter_path,
    matching_layers,
    module_names,
    paths_of,
    patterns_for,
    require_parts,
)
from prompt_tuning_jax.config.methods import LoRA
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.param_tree import require_same_names
from prompt_tuning_jax.typing import HostArray

A, B = "lora_A.weight", "lora_B.weight"
# Values of init_lora_weights that leave the model's weights unchanged.
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """A pair of ours: ``a_DR`` ``[in, rank]`` and ``b_RF`` ``[rank, out]``."""

    a_DR: HostArray
    b_RF: HostArray


def read_lora(
    described: Mapping[str, Any],
    where: Path,
    arrays: Mapping[str, Mapping[str, HostArray]],
    layers: Mapping[str, TheirLinear],
    file: Path,
) -> tuple[LoRA, dict[str, HostArray]]:
    """The method and its arrays by path; errors are those of ``read_peft_weights``."""
    rank, init = described.get("r"), described.get("init_lora_weights")
    if type(rank) is not int or rank < 1:
        raise UserError(f"{where}: r is {shown(rank)}; it must be a positive integer")
    if init not in _INITS:
        raise UserError(
            f"{where}: init_lora_weights is {shown(init)}, which changes the model's weights; "
            "convert the adapter to plain LoRA with PEFT first"
        )
    stabilized = bool(described.get("use_rslora"))
    alpha = _number(described, "lora_alpha", 8.0, where)
    ranks = described.get("rank_pattern") or {}
    alphas = described.get("alpha_pattern") or {}
    trainable = {}
    adapted: list[str] = []
    kinds: dict[tuple[int, float], tuple[str, float]] = {}
    for name, parts in arrays.items():
        layer, whole = layers[name], ranks.get(name, rank)
        require_parts(layer, parts, {A: (whole, layer.inputs), B: (layer.outputs, whole)}, file)
        pairs = _split(layer, parts[A], parts[B])
        for path, pair in pairs.items():
            trainable[adapter_path(path, "lora_a_DR")] = pair.a_DR
            trainable[adapter_path(path, "lora_b_RF")] = pair.b_RF
        adapted += pairs
        each = next(iter(pairs.values())).a_DR.shape[1]
        blocks = whole // each
        own_alpha = float(alphas.get(name, alpha)) / (blocks**0.5 if stabilized else blocks)
        kinds.setdefault((each, round(own_alpha, 6)), (name, own_alpha))
    if len(kinds) > 1:
        two = list(kinds.items())[:2]
        listed = ", ".join(f"{r} and {a:g} of {name}" for (r, a), (name, _) in two)
        raise UserError(
            f"{where}: layers differ in rank and alpha ({listed}), which is not supported; merge "
            "the adapter into the model with PEFT (merge_and_unload)"
        )
    (((own_rank, _), (_, own_alpha)),) = kinds.items()
    method = LoRA(
        rank=own_rank,
        alpha=own_alpha,
        rank_stabilized=stabilized,
        dropout=_number(described, "lora_dropout", 0.0, where),
        targets=patterns_for(adapted, paths_of(layers), usual=LoRA().targets),
    )
    for complaint in method.config_errors():
        raise UserError(f"{where}: {complaint}")
    return method, trainable


def written_lora(
    method: LoRA, arrays: Mapping[str, HostArray], layers: Mapping[str, TheirLinear]
) -> tuple[dict[str, Any], dict[str, HostArray]]:
    """The fields and the arrays of an adapter; errors are those of ``write_peft_weights``."""
    targets = set(matching_layers(method.targets, paths_of(layers)))
    wanted = [adapter_path(path, part) for path in targets for part in ("lora_a_DR", "lora_b_RF")]
    require_same_names(arrays, dict.fromkeys(wanted), of="the tuned arrays", and_of="LoRA")
    theirs: dict[str, HostArray] = {}
    ranks: dict[str, int] = {}
    for name, layer in layers.items():
        pairs = {
            path: _Pair(
                a_DR=arrays[adapter_path(path, "lora_a_DR")],
                b_RF=arrays[adapter_path(path, "lora_b_RF")],
            )
            for path in layer.parts
            if path in targets
        }
        if pairs:
            a_RD, b_FR = _joined(layer, pairs)
            theirs |= {layer.array(A): a_RD, layer.array(B): b_FR}
            ranks[name] = len(a_RD)
    alphas = {}
    for name, rank in ranks.items():
        times = rank // method.rank  # the same factor on the product
        alphas[name] = method.alpha * (times**0.5 if method.rank_stabilized else times)
    rank = min(ranks.values())
    alpha = next(alphas[name] for name in ranks if ranks[name] == rank)
    others = [name for name in ranks if ranks[name] != rank]
    fields = {
        "alpha_pattern": {name: alphas[name] for name in others},
        "bias": "none",
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": method.dropout,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {name: ranks[name] for name in others},
        "target_modules": module_names(ranks, layers),
        "use_dora": False,
        "use_rslora": method.rank_stabilized,
    }
    return fields, theirs


def _split(layer: TheirLinear, a_RD: HostArray, b_FR: HostArray) -> dict[str, _Pair]:
    """Our pairs, by path, of one of theirs; blocks become pairs of a lower rank."""
    blocks = _blocks(layer, b_FR)
    if not blocks:
        return {path: _pair(a_RD, b_FR[rows]) for path, rows in layer.parts.items()}
    return {
        path: _pair(a_RD[block], b_FR[layer.parts[path], block]) for path, block in blocks.items()
    }


def _joined(layer: TheirLinear, pairs: Mapping[str, _Pair]) -> tuple[HostArray, HostArray]:
    """Their pair ``[rank, in]`` and ``[out, rank]`` of ours, by path; absent ones add nothing."""
    first = next(iter(pairs.values()))
    rank = first.a_DR.shape[1]
    shared = all(np.array_equal(pair.a_DR, first.a_DR) for pair in pairs.values())
    each = [first.a_DR.T] if shared else [pair.a_DR.T for pair in pairs.values()]
    a_RD = np.concatenate(each)
    b_FR = np.zeros((layer.outputs, len(a_RD)), np.float32)
    for number, (path, pair) in enumerate(pairs.items()):
        start = 0 if shared else number * rank
        b_FR[layer.parts[path], start : start + rank] = pair.b_RF.T
    return np.ascontiguousarray(a_RD), b_FR


def _pair(a_RD: HostArray, b_FR: HostArray) -> _Pair:
    return _Pair(a_DR=np.ascontiguousarray(a_RD.T), b_RF=np.ascontiguousarray(b_FR.T))


def _blocks(layer: TheirLinear, b_FR: HostArray) -> dict[str, slice]:
    """The columns of each part's block, or nothing if the parts share columns."""
    used = {path: b_FR[rows].any(axis=0) for path, rows in layer.parts.items()}
    used = {path: columns_R for path, columns_R in used.items() if columns_R.any()}
    if len(used) < 2 or b_FR.shape[1] % len(used):
        return {}
    rank = b_FR.shape[1] // len(used)
    blocks = {path: slice(i * rank, (i + 1) * rank) for i, path in enumerate(used)}
    for path, columns_R in used.items():
        outside_R = columns_R.copy()
        outside_R[blocks[path]] = False
        if outside_R.any():
            return {}
    return blocks


def _number(described: Mapping[str, Any], field: str, default: float, where: Path) -> float:
    value = described.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise UserError(f"{where}: {field} is {shown(value)}; it must be a number")
    return float(value)
