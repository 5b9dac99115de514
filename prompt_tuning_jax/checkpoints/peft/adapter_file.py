"""PEFT's prompt tuning adapters: a folder with ``adapter_config.json`` and the prompt.

The format is that of peft 0.21, tuners/prompt_tuning and utils/save_and_load.py.
"""

import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prompt_tuning_jax.checkpoints.array_files import (
    checked_prompt,
    map_safetensors,
    read_safetensors,
    require_stored,
    safetensors_bytes,
)
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.storage import atomic_write_folder
from prompt_tuning_jax.typing import Array, DType, HostArray
from prompt_tuning_jax.untrusted_input import json_text, read_json_file

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TORCH_WEIGHTS = "adapter_model.bin"
KEY = "prompt_embeddings"
_PEFT_TYPE = "PROMPT_TUNING"
# Types of adapters that ``peft.prompts`` and ``peft.weights`` read.
OTHER_TYPES = (
    *("PREFIX_TUNING", "P_TUNING", "CPT", "CARTRIDGE", "MULTITASK_PROMPT_TUNING"),
    *("ADAPTION_PROMPT", "LORA", "IA3"),
)
# The kinds of models, and how many stacks each has for which PEFT saves a copy of a prompt.
_SEQ_2_SEQ = "SEQ_2_SEQ_LM"
_STACKS = {_SEQ_2_SEQ: 2, "CAUSAL_LM": 1}
# Fields of any adapter's config that say nothing about what it computes.
_OF_ORIGIN = (
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version"),
    *("revision", "task_type"),
)
# Fields of prompts, in any of their types: sizes, and how the arrays began and were trained.
_OF_PROMPTS = (
    *("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads"),
    *("num_layers", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"),
    *("tokenizer_kwargs", "prompt_tuning_init_state_dict_path", "prompt_tuning_init_task"),
    *("num_ranks", "num_tasks", "init_weights", "prefix_projection", "encoder_hidden_size"),
    *("encoder_num_layers", "encoder_dropout", "encoder_reparameterization_type"),
    *("cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask", "opt_weighted_loss_type"),
    *("opt_loss_decay_factor", "opt_projection_epsilon", "opt_projection_format_epsilon"),
    *("num_frozen_tokens", "target_modules", "adapter_len", "adapter_layers"),
)
# Fields of an adapter's config about the prompt's initialization, and about its model.
_OF_INIT = ("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path")
_OF_MODEL = ("num_attention_heads", "num_layers", "revision")
_LARGEST_CONFIG = 1_000_000  # bytes; PEFT's files have a few hundred


@dataclass(frozen=True, kw_only=True)
class PeftPrompt:
    """A PEFT adapter's prompt ``[P,D]`` as stored, and what its config says of its origin.

    ``task_type`` is PEFT's name of the kind of model, "" if unknown.  ``left_out`` is the number of
    further rows in the file: the copy for the decoder, which PEFT does not use with a T5.  ``kept``
    are fields of the config to write into a converted adapter.
    """

    prompt_PD: HostArray
    base_model_name_or_path: str
    peft_version: str
    task_type: str = ""
    left_out: int = 0
    kept: Mapping[str, Any] = field(default_factory=dict)


def is_peft(folder: Path) -> bool:
    """Returns whether a folder has any of a PEFT adapter's files."""
    return any((folder / name).exists() for name in (CONFIG, WEIGHTS, TORCH_WEIGHTS))


def read_peft(folder: str | Path) -> PeftPrompt:
    """Returns the prompt in a PEFT adapter's folder.

    By default PEFT stores one copy of the prompt per stack of a T5, ``[2P,D]``, and uses the first
    ``P`` rows, in the encoder.  Files that the config names are not opened.  Raises UserError for
    another type of adapter, for an array whose shape contradicts the config, and for missing or
    damaged files.
    """
    folder = Path(folder)
    config = read_config(folder / CONFIG)
    where = folder / CONFIG
    kind = config.get("peft_type")
    if kind != _PEFT_TYPE:
        raise UserError(f"{where}: {_not_a_prompt(kind)}")
    require_options(config, where)
    task = config.get("task_type")
    if task is not None and (not isinstance(task, str) or task not in _STACKS):
        listed = " or ".join(_STACKS)
        raise UserError(f"{where}: task_type is {shown(task)}; for a language model it is {listed}")
    stacks = 2 if task is None else _STACKS[task]
    length = _count(config, "num_virtual_tokens", where)
    if length is None:
        raise UserError(f"{where} has no num_virtual_tokens, the prompt's length")
    width = _count(config, "token_dim", where)
    copies = _count(config, "num_transformer_submodules", where)
    if copies is not None and copies > stacks:
        has = "a T5 has two stacks" if stacks == 2 else "a decoder-only model has one stack"
        raise UserError(f"{where}: num_transformer_submodules is {copies}; {has}")
    stored, file = _read_rows(folder)
    prompt = checked_prompt(stored, of=str(file), dtype=None)
    rows = [length * n for n in (range(1, stacks + 1) if copies is None else (copies,))]
    if len(prompt) not in rows or width not in (None, prompt.shape[1]):
        expected = [" or ".join(map(str, rows)), "any width" if width is None else width]
        raise UserError(
            f"{file} has shape {list(prompt.shape)}, but {CONFIG} requires "
            f"[{expected[0]}, {expected[1]}] (num_virtual_tokens × num_transformer_submodules, "
            "token_dim)"
        )
    return PeftPrompt(
        prompt_PD=np.ascontiguousarray(prompt[:length]),
        base_model_name_or_path=_text(config, "base_model_name_or_path"),
        peft_version=_text(config, "peft_version"),
        task_type=task or "",
        left_out=len(prompt) - length,
        kept={
            name: config[name]
            for name in (*_OF_INIT, *_OF_MODEL)
            if isinstance(config.get(name), str | int)
        },
    )


def write_peft(
    folder: str | Path,
    prompt_PD: Array | HostArray,
    *,
    base_model_name_or_path: str,
    task_type: str = _SEQ_2_SEQ,
    num_layers: int | None = None,
    num_attention_heads: int | None = None,
    like: PeftPrompt | None = None,
    dtype: DType | None = np.float32,
) -> None:
    """Writes a prompt ``[P,D]`` as a folder that PEFT's ``from_pretrained`` loads.

    Args:
      folder: written atomically; in an existing one, other files stay.
      prompt_PD: the prompt.
      base_model_name_or_path: the frozen model's Hugging Face name or folder.
      task_type: PEFT's name of the kind of that model.
      num_layers: of that model; None lets PEFT look it up.
      num_attention_heads: likewise.
      like: the adapter that the prompt comes from, whose config has further fields.
      dtype: None keeps the prompt's.

    Raises UserError if the array is not a prompt.
    """
    prompt = checked_prompt(np.asarray(prompt_PD), of="the prompt", dtype=dtype)
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name_or_path,
        "inference_mode": True,
        "modules_to_save": None,
        "num_attention_heads": num_attention_heads,
        "num_layers": num_layers,
        # One copy: a second would be for the decoder, which has no prompt.
        "num_transformer_submodules": 1,
        "num_virtual_tokens": len(prompt),
        "peft_type": _PEFT_TYPE,
        "prompt_tuning_init": "RANDOM",  # needs no tokenizer
        "prompt_tuning_init_text": None,
        "revision": None,
        "task_type": task_type,
        "token_dim": prompt.shape[1],
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    }
    if like is not None:
        config |= {name: like.kept[name] for name in _OF_INIT if name in like.kept}
        if like.base_model_name_or_path == base_model_name_or_path:
            config |= {name: config[name] or like.kept.get(name) for name in _OF_MODEL}
    with atomic_write_folder(Path(folder)) as temporary:
        text = json_text(config, indent=2, sort_keys=True) + "\n"
        (temporary / CONFIG).write_text(text, encoding="utf-8")
        rows = safetensors_bytes(prompt, key=KEY, metadata={"format": "pt"})
        (temporary / WEIGHTS).write_bytes(rows)


def read_config(path: Path) -> dict[str, Any]:
    """Returns an adapter's config; UserError if it is missing, damaged or not a JSON object."""
    config = read_json_file(
        path, of=f"cannot read the PEFT config {path}", max_bytes=_LARGEST_CONFIG
    )
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a JSON object, so it is not a PEFT config")
    return config


def require_task(described: Mapping[str, Any], wanted: str, where: Path) -> None:
    """Raises UserError for an adapter of another kind of model, as far as its config says."""
    task = described.get("task_type")
    if task not in (None, wanted):
        raise UserError(f"{where}: task_type is {shown(task)}; for this model it is {wanted}")


def require_options(
    described: Mapping[str, Any], where: Path, *, known: Collection[str] = _OF_PROMPTS
) -> None:
    """Raises UserError for an option that is set and unknown: it may change what is computed."""
    for name, value in described.items():
        if name not in known and name not in _OF_ORIGIN and value and value != "none":
            raise UserError(
                f"{where}: {name} is {shown(value)}, which is not supported; {what_is_read()}"
            )


def _not_a_prompt(kind: Any) -> str:
    if kind in OTHER_TYPES:
        return (
            f"a {kind} adapter is not a plain prompt; use its folder with predict, eval and serve "
            "--prompt(s), or attach it to a model with pt.attach"
        )
    return f"peft_type is {shown(kind)}; {what_is_read()}"


def what_is_read() -> str:
    """Returns the supported types of adapters, for messages about others."""
    return (
        f"supported adapters: {', '.join((_PEFT_TYPE, *OTHER_TYPES))}; merge others into the model "
        "with PEFT (merge_and_unload)"
    )


def _count(config: dict[str, Any], field: str, where: Path) -> int | None:
    """Returns a field with a positive integer; None if it is null or missing."""
    value = config.get(field)
    if value is not None and (type(value) is not int or value < 1):
        raise UserError(f"{where}: {field} is {shown(value)}; it must be a positive integer")
    return value


def _text(config: dict[str, Any], field: str) -> str:
    value = config.get(field)
    return value if isinstance(value, str) else ""


def shown(value: Any) -> str:
    """Returns a value of a config as messages quote it."""
    return json_text(value)[:80]


def in_float32(array: HostArray, *, of: str) -> HostArray:
    """Returns a copy of the array in float32.

    Raises UserError unless it has finite floating-point numbers.
    """
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise UserError(f"{of} has dtype {array.dtype}, not floating-point numbers")
    array = np.array(array, np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"{of} has numbers that are not finite")
    return array


def read_tensors(folder: Path) -> tuple[dict[str, HostArray], Path]:
    """Returns all arrays of an adapter by name, and their file.

    Like PEFT, prefers safetensors.  UserError for missing and damaged files.
    """
    path = folder / WEIGHTS
    if path.exists():
        return map_safetensors(path).arrays, path
    path = folder / TORCH_WEIGHTS
    if not path.exists():
        raise UserError(f"{folder} has a PEFT config but no {WEIGHTS}: the copy is incomplete")
    return _read_torch(path), path


def _read_rows(folder: Path) -> tuple[HostArray, Path]:
    """Returns the array of the prompt, and its file."""
    of = "a prompt's adapter"
    path = folder / WEIGHTS
    if path.exists():
        return read_safetensors(path, key=KEY, of=of)[0], path
    tensors, path = read_tensors(folder)
    if list(tensors) != [KEY]:
        listed = ", ".join(sorted(map(str, tensors))[:5]) or "nothing"
        raise UserError(f"{path} contains {listed}; {of} has one array {KEY!r}")
    return tensors[KEY], path


def _read_torch(path: Path) -> dict[Any, HostArray]:
    """Returns the tensors in a PyTorch file.

    PyTorch's loader for weights reads it and runs no code.
    """
    try:
        # An optional dependency.
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} is a PyTorch file, and PyTorch is not installed; save the adapter as {WEIGHTS}"
        ) from error
    try:
        # Files of torch before 1.6 are not archives and cannot be mapped.
        tensors = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:  # torch raises many types, some with pages of advice
        raise UserError(
            f"{path} is damaged, or contains more than tensors: {type(error).__name__}"
        ) from error
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise UserError(f"{path} contains something other than tensors by name")
    arrays = {}
    for name, tensor in tensors.items():
        try:
            require_stored(tensor, of=f"{path}: {name}")
            arrays[name] = _from_torch(tensor, torch)
        except (TypeError, RuntimeError) as error:  # sparse tensors, and types that NumPy lacks
            raise UserError(
                f"{path}: {name} is a tensor of {tensor.dtype}, {tensor.layout}, which is not read"
            ) from error
    return arrays


def _from_torch(tensor: Any, torch: Any) -> HostArray:
    import ml_dtypes

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:  # numpy has no bfloat16
        bits: HostArray = tensor.view(torch.int16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    array: HostArray = tensor.numpy()
    return array
