"""Reads and writes PEFT's prefix tuning, and reads its cartridges, which are prefixes.

The formats are those of peft 0.21: tuners/prefix_tuning, tuners/cartridge, and ``get_prompt`` in
peft_model.py, which says what they mean.  A decoder-only model has a pair of keys and values for
each layer.  In a T5 the prefixes are those of the decoder's self-attention.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from prompt_tuning_jax.checkpoints.peft.adapter_file import KEY
from prompt_tuning_jax.checkpoints.peft.modules import require_family
from prompt_tuning_jax.checkpoints.peft.opened import OpenedAdapter
from prompt_tuning_jax.config.methods import PrefixTuning
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.causal_lm.config import CausalLMConfig
from prompt_tuning_jax.models.config import ModelConfig
from prompt_tuning_jax.models.t5.config import T5Config
from prompt_tuning_jax.param_tree import require_same_names
from prompt_tuning_jax.typing import HostArray

PREFIX, CARTRIDGE = TYPES = ("PREFIX_TUNING", "CARTRIDGE")
_KEYS, _VALUES = "method/decoder/key_LPHK", "method/decoder/value_LPHK"


def read_prefix(
    adapter: OpenedAdapter, config: ModelConfig
) -> tuple[PrefixTuning, dict[str, HostArray]]:
    """Returns the method and its arrays by path; errors are those of ``read_peft_prompts``."""
    config = require_family(config)
    length, pairs = adapter.number("num_virtual_tokens"), adapter.number("num_layers")
    if isinstance(config, T5Config):
        adapter.require("token_dim", config.embed_dim, "the width of this model")
        _require_peft_can(config)
        heads = config.num_heads
        if pairs < config.num_decoder_layers:
            raise UserError(
                f"{adapter.where}: num_layers is {pairs}, but this model's decoder has "
                f"{config.num_decoder_layers} layers"
            )
        if adapter.copies(config) == 1:
            raise UserError(
                f"{adapter.where}: num_transformer_submodules is 1, which is not supported for a "
                "T5; PEFT's default is 2"
            )
        chosen = _pairs_of_layers(config, pairs)
    else:
        heads = config.num_kv_heads
        adapter.require("num_layers", config.num_layers, "the number of this model's layers")
        adapter.copies(config)
        chosen = list(range(config.num_layers))
    width = heads * config.head_dim
    adapter.require("token_dim", width, "the width of this model's keys together")
    adapter.require("num_attention_heads", heads, "the number of this model's heads of keys")
    rows = adapter.tensors({KEY: (length, pairs * 2 * width)})[KEY]
    pairs_PLXHK = rows.reshape(length, pairs, 2, heads, config.head_dim)
    key_value_XLPHK = np.moveaxis(pairs_PLXHK[:, chosen], (2, 1), (0, 1))
    method = PrefixTuning(length=length, encoder=False, cross=False, before=True, init="uniform")
    return method, {
        _KEYS: np.ascontiguousarray(key_value_XLPHK[0]),
        _VALUES: np.ascontiguousarray(key_value_XLPHK[1]),
    }


def written_prefix(
    method: PrefixTuning, arrays: Mapping[str, HostArray], config: ModelConfig
) -> tuple[dict[str, Any], dict[str, HostArray]]:
    """Returns the fields and the arrays of an adapter.

    Errors are those of ``write_peft_prompts``.
    """
    config = require_family(config)
    if method.hidden:
        raise UserError(
            "the MLP of a prefix must be folded (for_inference) before it is written for PEFT"
        )
    wanted = {_KEYS, _VALUES}
    if isinstance(config, CausalLMConfig):
        require_same_names(
            arrays, dict.fromkeys(wanted), of="the tuned arrays", and_of="PrefixTuning"
        )
        pairs_LPXHK = np.stack([arrays[_KEYS], arrays[_VALUES]], axis=2)
        stacks, heads = 1, config.num_kv_heads
    else:
        pairs_LPXHK = _pairs_of_t5(method, arrays, config)
        stacks, heads = 2, config.num_heads
    length, width = pairs_LPXHK.shape[1], heads * config.head_dim
    fields = {
        "encoder_hidden_size": width,
        "init_weights": None,
        "num_attention_heads": heads,
        "num_transformer_submodules": stacks,
        "num_virtual_tokens": length,
        "peft_type": PREFIX,
        "prefix_projection": False,  # folded, as PEFT itself saves it
        "token_dim": width,
    }
    return fields, {KEY: np.moveaxis(pairs_LPXHK, 0, 1).reshape(length, -1)}


def _pairs_of_t5(
    method: PrefixTuning, arrays: Mapping[str, HostArray], config: T5Config
) -> HostArray:
    """Returns the pairs ``[L, P, 2, H, K]`` that PEFT stores for these prefixes of a T5."""
    if method.encoder or method.cross or not method.before:
        raise UserError(
            "PEFT's prefixes for a T5 are only in the decoder's self-attention, at the positions "
            "before the target: they need method.encoder=false, method.cross=false and "
            "method.before=true"
        )
    _require_peft_can(config)
    wanted = dict.fromkeys((_KEYS, _VALUES))
    require_same_names(arrays, wanted, of="the tuned arrays", and_of="PrefixTuning")
    key_value_LPXHK = np.stack([arrays[_KEYS], arrays[_VALUES]], axis=2)
    layers = len(key_value_LPXHK)
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
    return pairs_LPXHK


def _pairs_of_layers(config: T5Config, pairs: int) -> list[int]:
    """Returns the stored pair that each decoder layer uses.

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
