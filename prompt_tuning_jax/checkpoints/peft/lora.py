"""LoRA in PEFT's adapters.

A fused projection of transformers' model is several layers of ours, which share its first matrix
and split the rows of its second.  Pairs that were trained here have a first matrix each.  They are
written as one pair of a higher rank, whose second matrix is zero outside their blocks::

    A = [A_q; A_k]      B = [[B_q, 0], [0, B_k]]
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prompt_tuning_jax.checkpoints.peft.adapter_file import shown
from prompt_tuning_jax.checkpoints.peft.modules import (
    TheirLinear,
    adapter_path,
    embedding_layers,
    linear_layers,
    matching_layers,
    module_names,
    paths_of,
    patterns_for,
    require_parts,
)
from prompt_tuning_jax.config.methods import LoRA
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.config import ModelConfig
from prompt_tuning_jax.param_tree import require_same_names
from prompt_tuning_jax.typing import HostArray
from prompt_tuning_jax.untrusted_input import compile_pattern

A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
# Values of init_lora_weights that leave the model's weights unchanged.
_MOST_PATTERNS = 4096  # of ranks or alphas, each of which is tried on every module
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """A pair of ours: ``a_DR`` ``[in, rank]``, ``b_RF`` ``[rank, out]``, and norms for DoRA."""

    a_DR: HostArray
    b_RF: HostArray
    magnitude_F: HostArray | None = None


def lora_layers(config: ModelConfig) -> dict[str, TheirLinear]:
    """Returns every layer that LoRA is read and written for, by transformers' name."""
    return linear_layers(config) | embedding_layers(config)


def read_lora(
    described: Mapping[str, Any],
    where: Path,
    arrays: Mapping[str, Mapping[str, HostArray]],
    layers: Mapping[str, TheirLinear],
    file: Path,
) -> tuple[LoRA, dict[str, HostArray]]:
    """Returns the method and its arrays by path; errors are those of ``read_peft_weights``."""
    rank, init = described.get("r", 8), described.get("init_lora_weights")
    if type(rank) is not int or rank < 1:
        raise UserError(f"{where}: r is {shown(rank)}; it must be a positive integer")
    if init not in _INITS:
        raise UserError(
            f"{where}: init_lora_weights is {shown(init)}, which changes the model's weights; "
            "convert the adapter to plain LoRA with PEFT first"
        )
    stabilized, dora = bool(described.get("use_rslora")), bool(described.get("use_dora"))
    alpha = _number(described, "lora_alpha", 8.0, where)
    their_ranks = _pattern(described, "rank_pattern", where)
    their_alphas = _pattern(described, "alpha_pattern", where)
    trainable: dict[str, HostArray] = {}
    ranks: dict[str, float] = {}
    alphas: dict[str, float] = {}
    for name, parts in arrays.items():
        layer, whole = layers[name], int(_of_module(their_ranks, name, rank))
        shapes: dict[str, tuple[int, ...]] = {
            _end(layer, A): (whole, layer.inputs),
            _end(layer, B): (layer.outputs, whole),
        }
        if dora:
            shapes[MAGNITUDE] = (layer.outputs,)
        require_parts(layer, parts, shapes, file)
        pairs = _split(layer, parts[_end(layer, A)], parts[_end(layer, B)], parts.get(MAGNITUDE))
        for path, pair in pairs.items():
            trainable |= _arrays_of(path, pair, embeds=layer.embeds)
            ranks[path] = pair.a_DR.shape[1]
            blocks = whole // pair.a_DR.shape[1]
            own_alpha = float(_of_module(their_alphas, name, alpha))
            alphas[path] = own_alpha / (blocks**0.5 if stabilized else blocks)
    linear, uses = paths_of(layers, embeddings=False), paths_of(layers, embeddings=True)
    usual_rank, other_ranks = _patterns_of(ranks)
    usual_alpha, other_alphas = _patterns_of(alphas)
    method = LoRA(
        rank=int(usual_rank),
        alpha=usual_alpha,
        ranks=other_ranks,
        alphas=other_alphas,
        rank_stabilized=stabilized,
        dropout=_number(described, "lora_dropout", 0.0, where),
        dora=dora,
        targets=patterns_for(set(ranks) & {*linear}, linear, usual=LoRA().targets),
        embeddings=patterns_for(set(ranks) & {*uses}, uses, usual=()),
    )
    for complaint in method.config_errors():
        raise UserError(f"{where}: {complaint}")
    return method, trainable


def written_lora(
    method: LoRA, arrays: Mapping[str, HostArray], layers: Mapping[str, TheirLinear]
) -> tuple[dict[str, Any], dict[str, HostArray]]:
    """Returns the fields and the arrays of an adapter.

    Errors are those of ``write_peft_weights``.
    """
    targets = set(matching_layers(method.targets, paths_of(layers, embeddings=False)))
    targets |= set(matching_layers(method.embeddings, paths_of(layers, embeddings=True)))
    wanted: dict[str, Any] = {}
    for layer in layers.values():
        for path in layer.parts.keys() & targets:
            wanted |= dict.fromkeys(_names_of(path, dora=method.dora, embeds=layer.embeds).values())
    require_same_names(arrays, wanted, of="the tuned arrays", and_of="LoRA")
    theirs: dict[str, HostArray] = {}
    ranks: dict[str, float] = {}
    alphas: dict[str, float] = {}
    for name, layer in layers.items():
        pairs = {
            path: _Pair(
                **{
                    field: arrays[own]
                    for field, own in _names_of(path, dora=method.dora, embeds=layer.embeds).items()
                }
            )
            for path in layer.parts
            if path in targets
        }
        if not pairs:
            continue
        scales = {(method.rank_of(path), method.scale_of(path)) for path in pairs}
        if len(scales) > 1:
            raise UserError(
                f"transformers' {name} is {', '.join(layer.parts)} in one, and PEFT has one rank "
                "and alpha for it: give these layers the same (method.ranks, method.alphas)"
            )
        ((_, scale),) = scales
        a_RD, b_FR = _joined(layer, pairs)
        theirs |= {layer.array(_end(layer, A)): a_RD, layer.array(_end(layer, B)): b_FR}
        if method.dora:
            theirs[layer.array(MAGNITUDE)] = _joined_magnitudes(layer, pairs)
        ranks[name] = len(a_RD)
        # The factor on the product stays the same where the rank is that of several pairs.
        alphas[name] = scale * (len(a_RD) ** 0.5 if method.rank_stabilized else len(a_RD))
    usual_rank, usual_alpha = _most_common(ranks), _most_common(alphas)
    fields = {
        "alpha_pattern": {n: alpha for n, alpha in alphas.items() if alpha != usual_alpha},
        "init_lora_weights": True,
        "lora_alpha": usual_alpha,
        "lora_dropout": method.dropout,
        "peft_type": "LORA",
        "r": usual_rank,
        "rank_pattern": {n: rank for n, rank in ranks.items() if rank != usual_rank},
        "target_modules": module_names(ranks, layers),
        "use_dora": method.dora,
        "use_rslora": method.rank_stabilized,
    }
    return fields, theirs


def adapted_names(method: LoRA, layers: Mapping[str, TheirLinear]) -> list[str]:
    """Returns transformers' names of the layers that the method updates."""
    targets = set(matching_layers(method.targets, paths_of(layers, embeddings=False)))
    return [name for name, layer in layers.items() if layer.parts.keys() & targets]


def _end(layer: TheirLinear, end: str) -> str:
    """Returns the end of the name of a matrix of this layer's pair."""
    return {A: EMBEDDING_A, B: EMBEDDING_B}[end] if layer.embeds else end


def _names_of(path: str, *, dora: bool, embeds: bool) -> dict[str, str]:
    """Returns the paths of a pair's arrays by the fields of ``_Pair``."""
    ours = ("lora_a_VR", "lora_b_RD", "lora_magnitude_D")
    if not embeds:
        ours = ("lora_a_DR", "lora_b_RF", "lora_magnitude_F")
    fields = ("a_DR", "b_RF", "magnitude_F")[: 3 if dora else 2]
    return {field: adapter_path(path, part) for field, part in zip(fields, ours, strict=False)}


def _arrays_of(path: str, pair: _Pair, *, embeds: bool) -> dict[str, HostArray]:
    names = _names_of(path, dora=pair.magnitude_F is not None, embeds=embeds)
    return {name: getattr(pair, field) for field, name in names.items()}


def _pattern(described: Mapping[str, Any], field: str, where: Path) -> list[tuple[Any, float]]:
    """Returns a field's regular expressions for names of modules, each with its number."""
    pattern = described.get(field) or {}
    kinds = (int,) if field == "rank_pattern" else (int, float)
    if not isinstance(pattern, dict):
        raise UserError(f"{where}: {field} is {shown(pattern)}; it must be numbers by name")
    if len(pattern) > _MOST_PATTERNS:
        raise UserError(
            f"{where}: {field} has {len(pattern):,} entries; at most {_MOST_PATTERNS:,} are read"
        )
    for key, value in pattern.items():
        if type(value) not in kinds or not np.isfinite(value) or (len(kinds) == 1 and value < 1):
            wanted = "a positive integer" if len(kinds) == 1 else "a number"
            raise UserError(f"{where}: {field} has {shown(value)} for {key}; it must be {wanted}")
        compile_pattern(key, of=f"{where}: {field}")
    # PEFT matches them with module names from their start.
    expressions = [compile_pattern(rf"(.*\.)?({key})", of="") for key in pattern]
    return list(zip(expressions, pattern.values(), strict=True))


def _of_module(pattern: Sequence[tuple[Any, float]], name: str, default: float) -> float:
    """Returns the number of the first expression that matches, as PEFT chooses."""
    return next((value for expression, value in pattern if expression.fullmatch(name)), default)


def _patterns_of(numbers: Mapping[str, float]) -> tuple[float, tuple[str, ...]]:
    """Returns the most common number, and entries ``REGEX=NUMBER`` for other paths."""
    rounded = {path: float(f"{number:.9g}") for path, number in numbers.items()}
    usual = _most_common(rounded)
    entries = []
    for number in dict.fromkeys(rounded.values()):
        paths = [path for path, value in rounded.items() if value == number]
        if number != usual:
            entries += [f"{p}={number:.9g}" for p in patterns_for(paths, rounded, usual=())]
    return usual, tuple(entries)


def _most_common(numbers: Mapping[str, float]) -> float:
    return Counter(numbers.values()).most_common(1)[0][0]


def _split(
    layer: TheirLinear, a_RD: HostArray, b_FR: HostArray, magnitude_F: HostArray | None
) -> dict[str, _Pair]:
    """Returns our pairs, by path, of one of theirs; blocks become pairs of a lower rank."""
    blocks = _blocks(layer, b_FR)
    if magnitude_F is not None and len(blocks) < len(layer.parts):
        blocks = {}  # all outputs have a norm
    pairs = {}
    for path, rows in layer.parts.items():
        if blocks and path not in blocks:
            continue
        block = blocks.get(path, slice(None))
        pairs[path] = _Pair(
            a_DR=np.ascontiguousarray(a_RD[block].T),
            b_RF=np.ascontiguousarray(b_FR[rows, block].T),
            magnitude_F=None if magnitude_F is None else np.ascontiguousarray(magnitude_F[rows]),
        )
    return pairs


def _joined(layer: TheirLinear, pairs: Mapping[str, _Pair]) -> tuple[HostArray, HostArray]:
    """Returns their pair ``[rank, in]`` and ``[out, rank]`` of ours, by path.

    Absent ones add nothing.
    """
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


def _joined_magnitudes(layer: TheirLinear, pairs: Mapping[str, _Pair]) -> HostArray:
    for path in layer.parts:
        if path not in pairs:
            raise UserError(
                f"transformers' {layer.name} is {', '.join(layer.parts)} in one, and with DoRA "
                f"PEFT has a norm for each of its outputs: add {path} to method.targets"
            )
    magnitudes_F = np.zeros(layer.outputs, np.float32)
    for path, pair in pairs.items():
        magnitudes_F[layer.parts[path]] = pair.magnitude_F
    return magnitudes_F


def _blocks(layer: TheirLinear, b_FR: HostArray) -> dict[str, slice]:
    """Returns the columns of each part's block, or nothing if the parts share columns."""
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
