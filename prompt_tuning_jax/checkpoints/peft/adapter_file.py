"""Prompts as PEFT keeps them: a folder with ``adapter_config.json`` and the prompt's rows.

The format is that of peft 0.21, tuners/prompt_tuning and utils/save_and_load.py.
"""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prompt_tuning_jax.checkpoints.mapped_safetensors import map_safetensors
from prompt_tuning_jax.checkpoints.prompt_array import (
    checked_prompt,
    read_safetensors,
    safetensors_bytes,
)
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.storage import folder_written_aside
from prompt_tuning_jax.typing import Array, DType, HostArray
from prompt_tuning_jax.untrusted_input import json_text, read_json_file

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TORCH_WEIGHTS = "adapter_model.bin"
KEY = "prompt_embeddings"
_PEFT_TYPE = "PROMPT_TUNING"
# Those that are no plain prompt; ``methods/peft_prompts.py`` and ``peft_weights.py`` read them.
OTHER_KINDS = ("PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "LORA", "IA3")
_TASK_TYPE = "SEQ_2_SEQ_LM"
# Of an adapter's config: how its prompt began, and what goes with the model that it names.
_OF_START = ("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path")
_OF_MODEL = ("num_attention_heads", "num_layers", "revision")
_LARGEST_CONFIG = 1_000_000  # bytes; PEFT's own have a few hundred


@dataclass(frozen=True, kw_only=True)
class PeftPrompt:
    """A PEFT adapter's prompt ``[P,D]`` as stored, and what its config says of its origin.

    ``left_out`` rows follow those of the prompt in the file: the copy for the decoder, which PEFT
    does not use with a T5.  ``kept`` are the fields of the config that hold for a copy, too.
    """

    prompt_PD: HostArray
    base_model_name_or_path: str
    peft_version: str
    left_out: int = 0
    kept: Mapping[str, Any] = field(default_factory=dict)


def is_peft(folder: Path) -> bool:
    """Whether a folder has any of a PEFT adapter's files."""
    return any((folder / name).exists() for name in (CONFIG, WEIGHTS, TORCH_WEIGHTS))


def read_peft(folder: str | Path) -> PeftPrompt:
    """The prompt in a PEFT adapter's folder.

    PEFT gives a T5 one copy of the prompt per stack, ``[2P,D]``, unless told otherwise, and uses
    the first ``P`` rows, in the encoder.  Nothing that the config names is opened.  Raises
    UserError for another kind of adapter, for rows that are not as many or as wide as the config
    says, and for missing or damaged files.
    """
    folder = Path(folder)
    config = read_config(folder / CONFIG)
    where = folder / CONFIG
    kind = config.get("peft_type")
    if kind != _PEFT_TYPE:
        raise UserError(f"{where}: {_not_a_prompt(kind)}")
    task = config.get("task_type")
    if task not in (None, _TASK_TYPE):
        raise UserError(f"{where}: task_type is {shown(task)}; for a T5 it is {_TASK_TYPE}")
    length = _count(config, "num_virtual_tokens", where)
    if length is None:
        raise UserError(f"{where} has no num_virtual_tokens, the prompt's length")
    width = _count(config, "token_dim", where)
    copies = _count(config, "num_transformer_submodules", where)
    if copies is not None and copies > 2:
        raise UserError(f"{where}: num_transformer_submodules is {copies}; a T5 has two stacks")
    stored, file = _read_rows(folder)
    prompt = checked_prompt(stored, of=str(file), dtype=None)
    rows = [length * n for n in ((1, 2) if copies is None else (copies,))]
    if len(prompt) not in rows or width not in (None, prompt.shape[1]):
        asked = [" or ".join(map(str, rows)), "any width" if width is None else width]
        raise UserError(
            f"{file} holds {list(prompt.shape)}, and by {CONFIG} it holds [{asked[0]}, {asked[1]}]"
            " (num_virtual_tokens × num_transformer_submodules, token_dim)"
        )
    return PeftPrompt(
        prompt_PD=np.ascontiguousarray(prompt[:length]),
        base_model_name_or_path=_text(config, "base_model_name_or_path"),
        peft_version=_text(config, "peft_version"),
        left_out=len(prompt) - length,
        kept={
            name: config[name]
            for name in (*_OF_START, *_OF_MODEL)
            if isinstance(config.get(name), str | int)
        },
    )


def write_peft(
    folder: str | Path,
    prompt_PD: Array | HostArray,
    *,
    base_model_name_or_path: str,
    num_layers: int | None = None,
    num_attention_heads: int | None = None,
    like: PeftPrompt | None = None,
    dtype: DType | None = np.float32,
) -> None:
    """Writes a prompt ``[P,D]`` as a folder that PEFT's ``from_pretrained`` loads for a T5.

    ``base_model_name_or_path`` is the frozen model's Hugging Face name or folder; PEFT fills in
    ``num_layers`` and ``num_attention_heads`` from that model where they are None.  ``like`` is
    the adapter that the prompt comes from, whose config says more.  ``dtype`` None keeps the
    prompt's own.  Written aside and renamed; in a folder that exists, other files stay.
    Raises UserError for what is not a prompt.
    """
    prompt = checked_prompt(np.asarray(prompt_PD), of="the prompt", dtype=dtype)
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name_or_path,
        "inference_mode": True,
        "modules_to_save": None,
        "num_attention_heads": num_attention_heads,
        "num_layers": num_layers,
        # One copy of the rows: the second would be for the decoder, which has no prompt.
        "num_transformer_submodules": 1,
        "num_virtual_tokens": len(prompt),
        "peft_type": _PEFT_TYPE,
        "prompt_tuning_init": "RANDOM",  # the one that needs no tokenizer to be named
        "prompt_tuning_init_text": None,
        "revision": None,
        "task_type": _TASK_TYPE,
        "token_dim": prompt.shape[1],
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    }
    if like is not None:
        config |= {name: like.kept[name] for name in _OF_START if name in like.kept}
        if like.base_model_name_or_path == base_model_name_or_path:
            config |= {name: config[name] or like.kept.get(name) for name in _OF_MODEL}
    with folder_written_aside(Path(folder)) as aside:
        (aside / CONFIG).write_text(json_text(config, indent=2, sort_keys=True) + "\n")
        rows = safetensors_bytes(prompt, key=KEY, metadata={"format": "pt"})
        (aside / WEIGHTS).write_bytes(rows)


def read_config(path: Path) -> dict[str, Any]:
    """An adapter's config; UserError where it is missing, damaged or no JSON object."""
    config = read_json_file(
        path, of=f"cannot read the PEFT config {path}", max_bytes=_LARGEST_CONFIG
    )
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no JSON object, so it is not a PEFT config")
    return config


def _not_a_prompt(kind: Any) -> str:
    if kind in OTHER_KINDS:
        return (
            f"a {kind} adapter, which is no plain prompt; predict, eval and serve take its folder "
            "with --prompt(s), and pt.attach puts it on the model"
        )
    return f"peft_type is {shown(kind)}; {what_is_read()}"


def what_is_read() -> str:
    """Which of PEFT's adapters can be used, for a message about another."""
    return (
        f"of PEFT's adapters {', '.join((_PEFT_TYPE, *OTHER_KINDS))} are read; one that can be "
        "merged is used as the model that merge_and_unload gives"
    )


def _count(config: dict[str, Any], field: str, where: Path) -> int | None:
    """A field that is a positive whole number, or None where it is null or missing."""
    value = config.get(field)
    if value is not None and (type(value) is not int or value < 1):
        raise UserError(f"{where}: {field} is {shown(value)}; it is a whole number from 1 on")
    return value


def _text(config: dict[str, Any], field: str) -> str:
    value = config.get(field)
    return value if isinstance(value, str) else ""


def shown(value: Any) -> str:
    """A value of a config, for a message."""
    return json_text(value)[:80]


def read_tensors(folder: Path) -> tuple[dict[str, HostArray], Path]:
    """All arrays of an adapter by their names, and the file that they are in.

    PEFT, too, prefers safetensors.  UserError for missing and damaged files.
    """
    path = folder / WEIGHTS
    if path.exists():
        return map_safetensors(path).arrays, path
    path = folder / TORCH_WEIGHTS
    if not path.exists():
        raise UserError(f"{folder} has a PEFT config and no {WEIGHTS}: the copy is incomplete")
    return _read_torch(path), path


def _read_rows(folder: Path) -> tuple[HostArray, Path]:
    """All rows, and the file that they are in."""
    of = "a prompt's adapter"
    path = folder / WEIGHTS
    if path.exists():
        return read_safetensors(path, key=KEY, of=of)[0], path
    tensors, path = read_tensors(folder)
    if list(tensors) != [KEY]:
        listed = ", ".join(sorted(map(str, tensors))[:5]) or "nothing"
        raise UserError(f"{path} holds {listed}; {of} holds one array {KEY!r}")
    return tensors[KEY], path


def _read_torch(path: Path) -> dict[Any, HostArray]:
    """The tensors in a PyTorch file, by PyTorch's loader that runs no code from it."""
    try:
        # By its name, since the package neither needs nor installs it.
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} is a PyTorch file, and PyTorch is not installed; save the adapter as {WEIGHTS}"
        ) from error
    try:
        # Files of torch before 1.6 are no archives and cannot be mapped.
        tensors = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:  # torch raises many kinds, some with pages of advice
        raise UserError(
            f"{path} is damaged or holds more than tensors: {type(error).__name__}"
        ) from error
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise UserError(f"{path} holds something else than tensors by their names")
    return {name: _from_torch(tensor, torch) for name, tensor in tensors.items()}


def _from_torch(tensor: Any, torch: Any) -> HostArray:
    import ml_dtypes

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:  # numpy has none of its own
        bits: HostArray = tensor.view(torch.int16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    array: HostArray = tensor.numpy()
    return array
