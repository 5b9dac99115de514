"""Reads and writes PEFT's prefixes, P-tuning, CPT, multitask and adaption prompts.

The formats are those of peft 0.21: tuners/p_tuning, tuners/cpt, tuners/multitask_prompt_tuning, and
``get_prompt`` in peft_model.py, which says what they mean; see also ``prefixes`` and ``adaption``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from prompt_tuning_jax.checkpoints.peft.adapter_file import (
    CONFIG,
    KEY,
    WEIGHTS,
    read_config,
    require_options,
    require_task,
    shown,
)
from prompt_tuning_jax.checkpoints.peft.adaption import ADAPTION, read_adaption, written_adaption
from prompt_tuning_jax.checkpoints.peft.modules import task_type
from prompt_tuning_jax.checkpoints.peft.opened import OpenedAdapter
from prompt_tuning_jax.checkpoints.peft.prefixes import (
    CARTRIDGE,
    PREFIX,
    read_prefix,
    written_prefix,
)
from prompt_tuning_jax.config.methods import (
    AdaptionPrompt,
    MethodConfig,
    MultitaskPrompts,
    PrefixTuning,
    PromptTuning,
    method_name,
)
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods.base import PROMPT
from prompt_tuning_jax.methods.multitask import COLS, ROWS, SHARED
from prompt_tuning_jax.models.config import ModelConfig
from prompt_tuning_jax.param_tree import require_same_names
from prompt_tuning_jax.storage import atomic_write_folder
from prompt_tuning_jax.typing import Array, HostArray
from prompt_tuning_jax.untrusted_input import json_text

P_TUNING, CPT, MULTITASK = "P_TUNING", "CPT", "MULTITASK_PROMPT_TUNING"
TYPES = (PREFIX, P_TUNING, MULTITASK, CPT, CARTRIDGE, ADAPTION)
_COLS, _ROWS = "prefix_task_cols", "prefix_task_rows"


@dataclass(frozen=True, kw_only=True)
class PeftPrompts:
    """A PEFT adapter as a method, its trained arrays by path, and its origin by its config.

    PEFT saves what an encoder computed and the sum of CPT's context and its change, so P-tuning and
    CPT are read as ``PromptTuning``, and cartridges as ``PrefixTuning``.  Prompts of the input are
    multiplied by ``ModelConfig.peft_prompt_scale``.
    """

    method: "_Method"
    trainable: dict[str, HostArray]
    base_model_name_or_path: str
    peft_version: str


def read_peft_prompts(folder: str | Path, config: ModelConfig) -> PeftPrompts:
    """Returns the adapter in a folder, for a model of this configuration; logits equal PEFT's.

    Files that its config names are not opened.  Raises UserError for another type of adapter, for
    arrays that do not fit the model or the config, and for missing or damaged files.
    """
    folder = Path(folder)
    adapter = OpenedAdapter(folder=folder, described=read_config(folder / CONFIG))
    kind = adapter.described.get("peft_type")
    readers: dict[str, _Reader] = {
        PREFIX: read_prefix,
        CARTRIDGE: read_prefix,
        P_TUNING: _read_prompt,
        CPT: _read_prompt,
        MULTITASK: _read_multitask,
        ADAPTION: read_adaption,
    }
    if kind not in TYPES:
        raise UserError(
            f"{adapter.where}: peft_type is {shown(kind)}; supported: {', '.join(TYPES)}"
        )
    require_task(adapter.described, task_type(config), adapter.where)
    require_options(adapter.described, adapter.where)
    method, trainable = readers[kind](adapter, config)
    return PeftPrompts(
        method=method,
        trainable=trainable,
        base_model_name_or_path=str(adapter.described.get("base_model_name_or_path") or ""),
        peft_version=str(adapter.described.get("peft_version") or ""),
    )


def write_peft_prompts(
    folder: str | Path,
    method: MethodConfig,
    trainable: Mapping[str, Array | HostArray],
    *,
    config: ModelConfig,
    base_model_name_or_path: str,
) -> None:
    """Writes a member, as a run saves it, to a folder that PEFT loads.

    A plain prompt becomes a P_TUNING adapter (``adapter_file.write_peft`` writes a PROMPT_TUNING
    adapter).  The folder is written atomically; in an existing one, other files stay.  Raises
    UserError for anything without a counterpart in PEFT.
    """
    described: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name_or_path,
        "inference_mode": True,
        "revision": None,
        "task_type": task_type(config),
    }
    of_prompts: dict[str, Any] = {
        "modules_to_save": None,
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_reading_layers,
        "num_transformer_submodules": 1,
        "token_dim": config.embed_dim,
    }
    arrays = {name: np.asarray(array, np.float32) for name, array in trainable.items()}
    if isinstance(method, AdaptionPrompt):
        of_prompts = {}
        fields, theirs = written_adaption(method, arrays, config)
    elif isinstance(method, PrefixTuning):
        fields, theirs = written_prefix(method, arrays, config)
    elif isinstance(method, MultitaskPrompts):
        fields, theirs = _written_multitask(method, arrays, config)
    elif isinstance(method, PromptTuning):
        fields, theirs = _written_prompt(method, arrays, config)
    else:
        raise UserError(
            f"PEFT has no adapter for {method_name(method)}; it has them for adaption_prompt, ia3, "
            "lora, multitask_prompts, p_tuning, prefix_tuning and prompt_tuning"
        )
    from safetensors.numpy import save

    with atomic_write_folder(Path(folder)) as temporary:
        text = json_text(described | of_prompts | fields, indent=2, sort_keys=True) + "\n"
        (temporary / CONFIG).write_text(text, encoding="utf-8")
        contiguous = {name: np.ascontiguousarray(array) for name, array in sorted(theirs.items())}
        (temporary / WEIGHTS).write_bytes(save(contiguous, {"format": "pt"}))


_Method: TypeAlias = PrefixTuning | PromptTuning | MultitaskPrompts | AdaptionPrompt
_Reader: TypeAlias = Callable[[OpenedAdapter, ModelConfig], tuple[_Method, dict[str, HostArray]]]


def _read_prompt(
    adapter: OpenedAdapter, config: ModelConfig
) -> tuple[PromptTuning, dict[str, HostArray]]:
    _require_width(adapter, config)
    length = adapter.number("num_virtual_tokens")
    shape = (length * adapter.copies(config), config.embed_dim)
    # Further rows are for the decoder, and PEFT does not use them with a T5.
    prompt_PD = adapter.tensors({KEY: shape})[KEY][:length]
    method = PromptTuning(length=length, init="uniform")
    return method, {PROMPT: prompt_PD * np.float32(config.peft_prompt_scale)}


def _require_width(adapter: OpenedAdapter, config: ModelConfig) -> None:
    adapter.require("token_dim", config.embed_dim, "the width of this model")


def _written_prompt(
    method: PromptTuning, arrays: Mapping[str, HostArray], config: ModelConfig
) -> tuple[dict[str, Any], dict[str, HostArray]]:
    require_usual(method)
    require_same_names(arrays, {PROMPT: None}, of="the tuned arrays", and_of="PromptTuning")
    fields = {
        "encoder_dropout": 0.0,
        "encoder_hidden_size": config.embed_dim,
        "encoder_num_layers": 2,
        "encoder_reparameterization_type": "MLP",  # not in the file, which has the encoder's output
        "num_virtual_tokens": len(arrays[PROMPT]),
        "peft_type": P_TUNING,
    }
    return fields, {KEY: arrays[PROMPT] / np.float32(config.peft_prompt_scale)}


def require_usual(method: PromptTuning) -> None:
    """Raises UserError for a prompt that is placed or masked as PEFT's are not."""
    seen = (method.prompt_to_input, method.prompt_to_prompt, method.input_to_prompt)
    if method.placement != "prefix" or seen != (True, "all", True):
        raise UserError(
            "PEFT's prompts are in front of the input and without attention masks; this one has "
            f"method.placement={method.placement} or a mask (method.prompt_to_input, "
            "method.prompt_to_prompt, method.input_to_prompt)"
        )


def _read_multitask(
    adapter: OpenedAdapter, config: ModelConfig
) -> tuple[MultitaskPrompts, dict[str, HostArray]]:
    _require_width(adapter, config)
    names = ("num_virtual_tokens", "num_tasks", "num_ranks")
    length, tasks, rank = map(adapter.number, names)
    copies, width = adapter.copies(config), config.embed_dim
    # The second half of each prompt is for the decoder's input.
    rows = length * copies
    shapes = {KEY: (rows, width), _COLS: (tasks, rows, rank), _ROWS: (tasks, rank, width)}
    tensors = adapter.tensors(shapes)
    method = MultitaskPrompts(
        length=length,
        decoder_length=rows - length,
        combine="low_rank",
        rank=rank,
        tasks=tasks,
        init="uniform",
    )
    # The scale of the shared prompt is that of its product with a task's.
    shared_PD = tensors[KEY] * np.float32(config.peft_prompt_scale)
    return method, {SHARED: shared_PD, COLS: tensors[_COLS], ROWS: tensors[_ROWS]}


def _written_multitask(
    method: MultitaskPrompts, arrays: Mapping[str, HostArray], config: ModelConfig
) -> tuple[dict[str, Any], dict[str, HostArray]]:
    if method.combine != "low_rank":
        raise UserError(
            "PEFT multiplies a shared prompt with one of low rank and has no counterpart of "
            f"method.combine={method.combine}; convert each task's prompt separately"
        )
    require_usual(method.task_prompt())
    if method.decoder_length not in (0, method.length):
        raise UserError(
            "PEFT's prompts in the decoder have the length of those in the encoder, "
            f"{method.length}; method.decoder_length is {method.decoder_length}"
        )
    wanted = dict.fromkeys((SHARED, COLS, ROWS))
    require_same_names(arrays, wanted, of="the tuned arrays", and_of="MultitaskPrompts")
    tasks, rows, rank = arrays[COLS].shape
    fields = {
        "num_ranks": rank,
        "num_tasks": tasks,
        "num_transformer_submodules": rows // method.length,
        "num_virtual_tokens": method.length,
        "peft_type": MULTITASK,
        "prompt_tuning_init": "RANDOM",  # needs no other fields
        "prompt_tuning_init_state_dict_path": None,
        "prompt_tuning_init_task": 0,
        "prompt_tuning_init_text": None,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    }
    shared_PD = arrays[SHARED] / np.float32(config.peft_prompt_scale)
    return fields, {KEY: shared_PD, _COLS: arrays[COLS], _ROWS: arrays[ROWS]}
