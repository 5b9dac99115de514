"""Reads and writes PEFT's prefix tuning, P-tuning and multitask prompts for a T5.

The formats are those of peft 0.21: tuners/prefix_tuning, tuners/p_tuning,
tuners/multitask_prompt_tuning, and ``get_prompt`` in peft_model.py, which says what they mean.
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
    read_tensors,
    shown,
)
from prompt_tuning_jax.config.methods import (
    MethodConfig,
    MultitaskPrompts,
    PrefixTuning,
    PromptTuning,
    method_name,
)
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods.base import PROMPT
from prompt_tuning_jax.methods.multitask import COLS, ROWS, SHARED
from prompt_tuning_jax.models.t5.config import T5Config
from prompt_tuning_jax.param_tree import require_same_names
from prompt_tuning_jax.storage import atomic_write_folder
from prompt_tuning_jax.typing import Array, HostArray
from prompt_tuning_jax.untrusted_input import json_text

PREFIX, P_TUNING, MULTITASK = TYPES = ("PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")
_TASK_TYPE = "SEQ_2_SEQ_LM"
_PREFIX_KEY, _PREFIX_VALUE = "method/decoder/key_LPHK", "method/decoder/value_LPHK"
_COLS, _ROWS = "prefix_task_cols", "prefix_task_rows"


@dataclass(frozen=True, kw_only=True)
class PeftPrompts:
    """A PEFT adapter as a method, its trained arrays by path, and its origin by its config.

    PEFT saves the prompt that P-tuning's encoder computed, so P-tuning is read as ``PromptTuning``.
    """

    method: PrefixTuning | PromptTuning | MultitaskPrompts
    trainable: dict[str, HostArray]
    base_model_name_or_path: str
    peft_version: str


def read_peft_prompts(folder: str | Path, config: T5Config) -> PeftPrompts:
    """The adapter in a folder, for a model of this configuration; logits equal PEFT's.

    Files that its config names are not opened.  Raises UserError for another type of adapter, for
    features without a counterpart here (prompts in the decoder's input), for arrays that do not fit
    the model or the config, and for missing or damaged files.
    """
    folder = Path(folder)
    adapter = _Adapter(folder=folder, described=read_config(folder / CONFIG))
    kind = adapter.described.get("peft_type")
    readers: dict[str, _Reader] = {
        PREFIX: _read_prefix,
        P_TUNING: _read_p_tuning,
        MULTITASK: _read_multitask,
    }
    if kind not in TYPES:
        raise UserError(
            f"{adapter.where}: peft_type is {shown(kind)}; supported: {', '.join(TYPES)}"
        )
    task = adapter.described.get("task_type")
    if task not in (None, _TASK_TYPE):
        raise UserError(f"{adapter.where}: task_type is {shown(task)}; for a T5 it is {_TASK_TYPE}")
    adapter.require("token_dim", config.embed_dim, "the width of this model")
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
    config: T5Config,
    base_model_name_or_path: str,
) -> None:
    """Writes a member, as a run saves it, to a folder that PEFT loads for a T5.

    A plain prompt becomes a P_TUNING adapter (``adapter_file.write_peft`` writes a PROMPT_TUNING
    adapter).  The folder is written atomically; in an existing one, other files stay.  Raises
    UserError for anything without a counterpart in PEFT.
    """
    described: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name_or_path,
        "inference_mode": True,
        "modules_to_save": None,
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_encoder_layers,
        "num_transformer_submodules": 1,
        "revision": None,
        "task_type": _TASK_TYPE,
        "token_dim": config.embed_dim,
    }
    arrays = {name: np.asarray(array, np.float32) for name, array in trainable.items()}
    if isinstance(method, PrefixTuning):
        fields, theirs = _written_prefix(method, arrays, config)
    elif isinstance(method, MultitaskPrompts):
        fields, theirs = _written_multitask(method, arrays)
    elif isinstance(method, PromptTuning):
        fields, theirs = _written_prompt(method, arrays, config)
    else:
        raise UserError(
            f"PEFT has no adapter for {method_name(method)}; it has them for ia3, lora, "
            "multitask_prompts, p_tuning, prefix_tuning and prompt_tuning"
        )
    from safetensors.numpy import save

    with atomic_write_folder(Path(folder)) as temporary:
        text = json_text(described | fields, indent=2, sort_keys=True) + "\n"
        (temporary / CONFIG).write_text(text, encoding="utf-8")
        contiguous = {name: np.ascontiguousarray(array) for name, array in sorted(theirs.items())}
        (temporary / WEIGHTS).write_bytes(save(contiguous, {"format": "pt"}))


_Method: TypeAlias = PrefixTuning | PromptTuning | MultitaskPrompts


@dataclass(frozen=True, kw_only=True)
class _Adapter:
    folder: Path
    described: Mapping[str, Any]

    @property
    def where(self) -> Path:
        return self.folder / CONFIG

    def number(self, field: str) -> int:
        value = self.described.get(field)
        if type(value) is not int or value < 1:
            raise UserError(
                f"{self.where}: {field} is {shown(value)}; it must be a positive integer"
            )
        return value

    def require(self, field: str, wanted: int, what: str) -> None:
        value = self.described.get(field)
        if value is not None and value != wanted:
            raise UserError(f"{self.where}: {field} is {shown(value)}, but {what} is {wanted}")

    def copies(self) -> int:
        """The number of stacks that it has arrays for; PEFT's default for a T5 is both."""
        copies = self.described.get("num_transformer_submodules")
        if copies not in (None, 1, 2):
            raise UserError(
                f"{self.where}: num_transformer_submodules is {shown(copies)}; a T5 has two stacks"
            )
        return 2 if copies is None else int(copies)

    def tensors(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, HostArray]:
        """The arrays in float32; UserError for other names or shapes, or NaN and infinity."""
        tensors, file = read_tensors(self.folder)
        require_same_names(tensors, shapes, of=str(file), and_of="an adapter of its kind")
        for name, shape in shapes.items():
            array = tensors[name]
            if array.shape != shape:
                raise UserError(
                    f"{file}: {name} is {list(array.shape)}, but {CONFIG} and this model require "
                    f"{list(shape)}"
                )
            if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
                raise UserError(
                    f"{file}: {name} has dtype {array.dtype}, not floating-point numbers"
                )
            if not np.isfinite(array.astype(np.float32)).all():
                raise UserError(f"{file}: {name} has numbers that are not finite")
        return {name: tensors[name].astype(np.float32) for name in shapes}


_Reader: TypeAlias = Callable[[_Adapter, T5Config], tuple[_Method, dict[str, HostArray]]]


def _read_prefix(adapter: _Adapter, config: T5Config) -> tuple[PrefixTuning, dict[str, HostArray]]:
    length, pairs = adapter.number("num_virtual_tokens"), adapter.number("num_layers")
    _require_peft_can(config)
    adapter.require("num_attention_heads", config.num_heads, "the number of this model's heads")
    if pairs < config.num_decoder_layers:
        raise UserError(
            f"{adapter.where}: num_layers is {pairs}, but this model's decoder has "
            f"{config.num_decoder_layers} layers"
        )
    if adapter.copies() == 1:
        raise UserError(
            f"{adapter.where}: num_transformer_submodules is 1, which PEFT refuses for a T5"
        )
    width = config.embed_dim
    rows = adapter.tensors({KEY: (length, pairs * 2 * width)})[KEY]
    pairs_PLXHK = rows.reshape(length, pairs, 2, config.num_heads, config.head_dim)
    chosen = _pairs_of_layers(config, pairs)
    key_value_XLPHK = np.moveaxis(pairs_PLXHK[:, chosen], (2, 1), (0, 1))
    method = PrefixTuning(length=length, encoder=False, cross=False, before=True, init="uniform")
    return method, {
        _PREFIX_KEY: np.ascontiguousarray(key_value_XLPHK[0]),
        _PREFIX_VALUE: np.ascontiguousarray(key_value_XLPHK[1]),
    }


def _written_prefix(
    method: PrefixTuning, arrays: Mapping[str, HostArray], config: T5Config
) -> tuple[dict[str, Any], dict[str, HostArray]]:
    if method.hidden:
        raise UserError(
            "the MLP of a prefix must be folded (for_inference) before it is written for PEFT"
        )
    if method.encoder or method.cross or not method.before:
        raise UserError(
            "PEFT's prefixes for a T5 are only in the decoder's self-attention, at the positions "
            "before the target: they need method.encoder=false, method.cross=false and "
            "method.before=true"
        )
    _require_peft_can(config)
    wanted = {_PREFIX_KEY, _PREFIX_VALUE}
    require_same_names(arrays, dict.fromkeys(wanted), of="the tuned arrays", and_of="PrefixTuning")
    key_value_LPXHK = np.stack([arrays[_PREFIX_KEY], arrays[_PREFIX_VALUE]], axis=2)
    layers, length = key_value_LPXHK.shape[:2]
    # PEFT takes the number from the encoder, and refuses fewer than the decoder's.
    pairs = config.num_encoder_layers
    if pairs < layers:
        raise UserError(
            f"PEFT has one prefix per encoder layer, {pairs}, but this model's decoder has "
            f"{layers} layers"
        )
    pairs_LPXHK = np.zeros((pairs, *key_value_LPXHK.shape[1:]), np.float32)
    given: dict[int, int] = {}
    for layer, pair in enumerate(_pairs_of_layers(config, pairs)):
        if pair in given and not np.array_equal(
            key_value_LPXHK[layer], key_value_LPXHK[given[pair]]
        ):
            raise UserError(
                f"PEFT uses the same prefix for decoder layers {given[pair]} and {layer} of a T5, "
                "but here they differ; it uses one per layer only if their number is odd"
            )
        given.setdefault(pair, layer)
        pairs_LPXHK[pair] = key_value_LPXHK[layer]
    rows = np.moveaxis(pairs_LPXHK, 0, 1).reshape(length, -1)
    fields = {
        "encoder_hidden_size": config.embed_dim,
        "init_weights": None,
        "num_transformer_submodules": 2,
        "num_virtual_tokens": length,
        "peft_type": PREFIX,
        "prefix_projection": False,  # folded, as PEFT itself saves it
    }
    return fields, {KEY: rows}


def _pairs_of_layers(config: T5Config, pairs: int) -> list[int]:
    """The stored pair that each decoder layer uses.

    PEFT repeats the pairs for two stacks and splits them two at a time, and a T5 uses the first of
    each two: layer i uses pair 2i, modulo the number of pairs.
    """
    return [2 * layer % pairs for layer in range(config.num_decoder_layers)]


def _require_peft_can(config: T5Config) -> None:
    if config.num_heads * config.head_dim != config.embed_dim:
        raise UserError(
            f"PEFT's prefixes have the model's width, {config.embed_dim}, but this model's heads "
            f"are {config.num_heads} x {config.head_dim}, which PEFT does not support"
        )


def _read_p_tuning(
    adapter: _Adapter, config: T5Config
) -> tuple[PromptTuning, dict[str, HostArray]]:
    length = adapter.number("num_virtual_tokens")
    shape = (length * adapter.copies(), config.embed_dim)
    # Further rows are for the decoder, and PEFT does not use them with a T5.
    prompt_PD = adapter.tensors({KEY: shape})[KEY][:length]
    method = PromptTuning(length=length, init="uniform")
    return method, {PROMPT: np.ascontiguousarray(prompt_PD)}


def _written_prompt(
    method: PromptTuning, arrays: Mapping[str, HostArray], config: T5Config
) -> tuple[dict[str, Any], dict[str, HostArray]]:
    seen = (method.prompt_to_input, method.prompt_to_prompt, method.input_to_prompt)
    if method.placement != "prefix" or seen != (True, "all", True):
        raise UserError(
            "PEFT's prompts are in front of the input and without attention masks; this one has "
            f"method.placement={method.placement} or a mask (method.prompt_to_input, "
            "method.prompt_to_prompt, method.input_to_prompt)"
        )
    require_same_names(arrays, {PROMPT: None}, of="the tuned arrays", and_of="PromptTuning")
    fields = {
        "encoder_dropout": 0.0,
        "encoder_hidden_size": config.embed_dim,
        "encoder_num_layers": 2,
        "encoder_reparameterization_type": "MLP",  # not in the file, which has the encoder's output
        "num_virtual_tokens": len(arrays[PROMPT]),
        "peft_type": P_TUNING,
    }
    return fields, {KEY: arrays[PROMPT]}


def _read_multitask(
    adapter: _Adapter, config: T5Config
) -> tuple[MultitaskPrompts, dict[str, HostArray]]:
    names = ("num_virtual_tokens", "num_tasks", "num_ranks")
    length, tasks, rank = map(adapter.number, names)
    if adapter.copies() == 2:
        raise UserError(
            f"{adapter.where}: num_transformer_submodules is 2, which puts half of each prompt "
            "into the decoder's input and is not supported; train it with 1"
        )
    width = config.embed_dim
    shapes = {KEY: (length, width), _COLS: (tasks, length, rank), _ROWS: (tasks, rank, width)}
    tensors = adapter.tensors(shapes)
    method = MultitaskPrompts(
        length=length, combine="low_rank", rank=rank, tasks=tasks, init="uniform"
    )
    return method, {SHARED: tensors[KEY], COLS: tensors[_COLS], ROWS: tensors[_ROWS]}


def _written_multitask(
    method: MultitaskPrompts, arrays: Mapping[str, HostArray]
) -> tuple[dict[str, Any], dict[str, HostArray]]:
    if method.combine != "low_rank":
        raise UserError(
            "PEFT multiplies a shared prompt with one of low rank and has no counterpart of "
            f"method.combine={method.combine}; convert each task's prompt separately"
        )
    wanted = dict.fromkeys((SHARED, COLS, ROWS))
    require_same_names(arrays, wanted, of="the tuned arrays", and_of="MultitaskPrompts")
    tasks, length, rank = arrays[COLS].shape
    fields = {
        "num_ranks": rank,
        "num_tasks": tasks,
        "num_virtual_tokens": length,
        "peft_type": MULTITASK,
        "prompt_tuning_init": "RANDOM",  # needs no other fields
        "prompt_tuning_init_state_dict_path": None,
        "prompt_tuning_init_task": 0,
        "prompt_tuning_init_text": None,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    }
    return fields, {KEY: arrays[SHARED], _COLS: arrays[COLS], _ROWS: arrays[ROWS]}
