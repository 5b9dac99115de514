"""Prefix tuning, P-tuning and multitask prompts as PEFT keeps them for a T5, both ways.

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
from prompt_tuning_jax.storage import folder_written_aside
from prompt_tuning_jax.typing import Array, HostArray
from prompt_tuning_jax.untrusted_input import json_text

PREFIX, P_TUNING, MULTITASK = KINDS = ("PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")
_TASK_TYPE = "SEQ_2_SEQ_LM"
_PREFIX_KEY, _PREFIX_VALUE = "method/decoder/key_LPHK", "method/decoder/value_LPHK"
_COLS, _ROWS = "prefix_task_cols", "prefix_task_rows"


@dataclass(frozen=True, kw_only=True)
class PeftPrompts:
    """A PEFT adapter as a method, the arrays that it tunes by path, and where it says it is from.

    Of P-tuning PEFT keeps the prompt that its encoder made, and so it is ``PromptTuning``.
    """

    method: PrefixTuning | PromptTuning | MultitaskPrompts
    trainable: dict[str, HostArray]
    base_model_name_or_path: str
    peft_version: str


def read_peft_prompts(folder: str | Path, config: T5Config) -> PeftPrompts:
    """The adapter in a folder, for a model of this configuration; it gives PEFT's logits there.

    Nothing that its config names is opened.  Raises UserError for another kind of adapter, for what
    has no counterpart here (prompts in the decoder's input), for arrays that do not fit the model
    or the config, and for missing or damaged files.
    """
    folder = Path(folder)
    adapter = _Adapter(folder=folder, described=read_config(folder / CONFIG))
    kind = adapter.described.get("peft_type")
    readers: dict[str, _Reader] = {
        PREFIX: _read_prefix,
        P_TUNING: _read_p_tuning,
        MULTITASK: _read_multitask,
    }
    if kind not in KINDS:
        raise UserError(
            f"{adapter.where}: peft_type is {shown(kind)}; only {', '.join(KINDS)} are read"
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
    """Writes a member as a run saves it, as a folder that PEFT loads for a T5.

    A plain prompt becomes a P_TUNING adapter (``checkpoints.peft.write_peft`` makes the same one a
    PROMPT_TUNING adapter).  Written aside and renamed; in a folder that exists, other files stay.
    Raises UserError for what PEFT has no counterpart of, and says which.
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
        own, theirs = _written_prefix(method, arrays, config)
    elif isinstance(method, MultitaskPrompts):
        own, theirs = _written_multitask(method, arrays)
    elif isinstance(method, PromptTuning):
        own, theirs = _written_prompt(method, arrays, config)
    else:
        raise UserError(
            f"PEFT has no adapter for {method_name(method)}; it has them for ia3, lora, "
            "multitask_prompts, p_tuning, prefix_tuning and prompt_tuning"
        )
    from safetensors.numpy import save

    with folder_written_aside(Path(folder)) as aside:
        text = json_text(described | own, indent=2, sort_keys=True) + "\n"
        (aside / CONFIG).write_text(text, encoding="utf-8")
        contiguous = {name: np.ascontiguousarray(array) for name, array in sorted(theirs.items())}
        (aside / WEIGHTS).write_bytes(save(contiguous, {"format": "pt"}))


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
                f"{self.where}: {field} is {shown(value)}; it is a whole number from 1 on"
            )
        return value

    def require(self, field: str, wanted: int, what: str) -> None:
        found = self.described.get(field)
        if found is not None and found != wanted:
            raise UserError(f"{self.where}: {field} is {shown(found)}, and {what} is {wanted}")

    def copies(self) -> int:
        """For how many stacks it holds something; a T5 has two, which is what PEFT fills in."""
        copies = self.described.get("num_transformer_submodules")
        if copies not in (None, 1, 2):
            raise UserError(
                f"{self.where}: num_transformer_submodules is {shown(copies)}; a T5 has two stacks"
            )
        return 2 if copies is None else int(copies)

    def tensors(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, HostArray]:
        """The arrays in float32; UserError unless they are these, of these shapes, and finite."""
        tensors, file = read_tensors(self.folder)
        require_same_names(tensors, shapes, of=str(file), and_of="an adapter of its kind")
        for name, shape in shapes.items():
            found = tensors[name]
            if found.shape != shape:
                raise UserError(
                    f"{file}: {name} is {list(found.shape)}, and by {CONFIG} and this model it is "
                    f"{list(shape)}"
                )
            if found.dtype.kind != "f" and found.dtype.name != "bfloat16":
                raise UserError(f"{file}: {name} holds {found.dtype}, no floating-point numbers")
            if not np.isfinite(found.astype(np.float32)).all():
                raise UserError(f"{file}: {name} holds numbers that are not finite")
        return {name: tensors[name].astype(np.float32) for name in shapes}


_Reader: TypeAlias = Callable[[_Adapter, T5Config], tuple[_Method, dict[str, HostArray]]]


def _read_prefix(adapter: _Adapter, config: T5Config) -> tuple[PrefixTuning, dict[str, HostArray]]:
    length, pairs = adapter.number("num_virtual_tokens"), adapter.number("num_layers")
    _require_peft_can(config)
    adapter.require("num_attention_heads", config.num_heads, "the number of this model's heads")
    if pairs < config.num_decoder_layers:
        raise UserError(
            f"{adapter.where}: num_layers is {pairs} and this model's decoder has "
            f"{config.num_decoder_layers} layers, some of which would get none"
        )
    if adapter.copies() == 1:
        raise UserError(
            f"{adapter.where}: num_transformer_submodules is 1, and PEFT itself stops at a T5 then"
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
        raise UserError("the MLP of a prefix is folded away before it is written for PEFT")
    if method.encoder or method.cross or not method.before:
        raise UserError(
            "PEFT gives a T5 prefixes in the decoder's self-attention alone, at the positions "
            "before the target; only those of method.encoder=false, method.cross=false and "
            "method.before=true can be written for it"
        )
    _require_peft_can(config)
    wanted = {_PREFIX_KEY, _PREFIX_VALUE}
    require_same_names(arrays, dict.fromkeys(wanted), of="the tuned arrays", and_of="PrefixTuning")
    key_value_LPXHK = np.stack([arrays[_PREFIX_KEY], arrays[_PREFIX_VALUE]], axis=2)
    layers, length = key_value_LPXHK.shape[:2]
    # PEFT takes the number from the encoder, and refuses to have fewer than the decoder's.
    pairs = config.num_encoder_layers
    if pairs < layers:
        raise UserError(
            f"PEFT makes as many prefixes as the encoder has layers, {pairs}, and this model's "
            f"decoder has {layers}"
        )
    pairs_LPXHK = np.zeros((pairs, *key_value_LPXHK.shape[1:]), np.float32)
    given: dict[int, int] = {}
    for layer, pair in enumerate(_pairs_of_layers(config, pairs)):
        if pair in given and not np.array_equal(
            key_value_LPXHK[layer], key_value_LPXHK[given[pair]]
        ):
            raise UserError(
                f"PEFT gives a T5's decoder layers {given[pair]} and {layer} the same prefix, and "
                "here they differ; it has one for each where their number is odd"
            )
        given.setdefault(pair, layer)
        pairs_LPXHK[pair] = key_value_LPXHK[layer]
    rows = np.moveaxis(pairs_LPXHK, 0, 1).reshape(length, -1)
    own = {
        "encoder_hidden_size": config.embed_dim,
        "init_weights": None,
        "num_transformer_submodules": 2,
        "num_virtual_tokens": length,
        "peft_type": PREFIX,
        "prefix_projection": False,  # folded: PEFT keeps no more of one either
    }
    return own, {KEY: rows}


def _pairs_of_layers(config: T5Config, pairs: int) -> list[int]:
    """Which of the stored pairs each decoder layer gets.

    PEFT puts the pairs behind themselves, for two stacks, and deals them out two at a time, of
    which a T5 uses the first: layer i gets pair 2i, counted round.
    """
    return [2 * layer % pairs for layer in range(config.num_decoder_layers)]


def _require_peft_can(config: T5Config) -> None:
    if config.num_heads * config.head_dim != config.embed_dim:
        raise UserError(
            f"PEFT's prefixes have the model's width, {config.embed_dim}, and this model's heads "
            f"are {config.num_heads} x {config.head_dim}; PEFT itself stops at it"
        )


def _read_p_tuning(
    adapter: _Adapter, config: T5Config
) -> tuple[PromptTuning, dict[str, HostArray]]:
    length = adapter.number("num_virtual_tokens")
    shape = (length * adapter.copies(), config.embed_dim)
    # The rows behind are made for the decoder, and PEFT does not use them with a T5.
    prompt_PD = adapter.tensors({KEY: shape})[KEY][:length]
    method = PromptTuning(length=length, init="uniform")
    return method, {PROMPT: np.ascontiguousarray(prompt_PD)}


def _written_prompt(
    method: PromptTuning, arrays: Mapping[str, HostArray], config: T5Config
) -> tuple[dict[str, Any], dict[str, HostArray]]:
    seen = (method.prompt_to_input, method.prompt_to_prompt, method.input_to_prompt)
    if method.placement != "prefix" or seen != (True, "all", True):
        raise UserError(
            "PEFT puts a prompt in front of the input, where all see it; this one has "
            f"method.placement={method.placement}, or its sight is limited"
        )
    require_same_names(arrays, {PROMPT: None}, of="the tuned arrays", and_of="PromptTuning")
    own = {
        "encoder_dropout": 0.0,
        "encoder_hidden_size": config.embed_dim,
        "encoder_num_layers": 2,
        "encoder_reparameterization_type": "MLP",  # not in the file: its rows are what it made
        "num_virtual_tokens": len(arrays[PROMPT]),
        "peft_type": P_TUNING,
    }
    return own, {KEY: arrays[PROMPT]}


def _read_multitask(
    adapter: _Adapter, config: T5Config
) -> tuple[MultitaskPrompts, dict[str, HostArray]]:
    names = ("num_virtual_tokens", "num_tasks", "num_ranks")
    length, tasks, rank = map(adapter.number, names)
    if adapter.copies() == 2:
        raise UserError(
            f"{adapter.where}: num_transformer_submodules is 2, so that half of each prompt stands "
            "in the decoder's input, which nothing here does; train it with 1"
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
            "PEFT multiplies a shared prompt with one of low rank; method.combine="
            f"{method.combine} has no counterpart there, but each task's prompt by itself has"
        )
    wanted = dict.fromkeys((SHARED, COLS, ROWS))
    require_same_names(arrays, wanted, of="the tuned arrays", and_of="MultitaskPrompts")
    tasks, length, rank = arrays[COLS].shape
    own = {
        "num_ranks": rank,
        "num_tasks": tasks,
        "num_virtual_tokens": length,
        "peft_type": MULTITASK,
        "prompt_tuning_init": "RANDOM",  # the one that needs nothing else to be named
        "prompt_tuning_init_state_dict_path": None,
        "prompt_tuning_init_task": 0,
        "prompt_tuning_init_text": None,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    }
    return own, {KEY: arrays[SHARED], _COLS: arrays[COLS], _ROWS: arrays[ROWS]}
