"""What llama.cpp's metadata say of a model, and its names of tensors, by architecture.

Sources: llama.cpp's ``convert_hf_to_gguf.py`` (what is stored), ``llama-model.cpp`` (what an
architecture implies), and the package gguf (``tensor_mapping.py``, names).
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prompt_tuning_jax.checkpoints.hf.names import NameTable
from prompt_tuning_jax.data.vocabularies.gguf_tokenizer import is_no_token, token_ids_of
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.causal_lm.config import (
    CausalLMConfig,
    RopeScaling,
    yarn_attention_factor,
)
from prompt_tuning_jax.models.config import TokenIds

_QKV = ("self_attention/query", "self_attention/key", "self_attention/value")
_NAMES = NameTable(
    prefixes=("",),
    outside={
        "token_embedder": "token_embd",
        "position_embedder": "position_embd",
        "embedding_norm": "token_embd_norm",
        "decoder/decoder_norm": "output_norm",
    },
    layers="blk",
    layer={
        "pre_self_attention_layer_norm": "attn_norm",
        "self_attention/query": "attn_q",
        "self_attention/key": "attn_k",
        "self_attention/value": "attn_v",
        "self_attention/out": "attn_output",
        "self_attention/query_norm": "attn_q_norm",
        "self_attention/key_norm": "attn_k_norm",
        "post_self_attention_layer_norm": "post_attention_norm",
        "pre_mlp_layer_norm": "ffn_norm",
        "mlp/wi_0": "ffn_gate",
        "mlp/wi_1": "ffn_up",
        "mlp/wi": "ffn_up",
        "mlp/wo": "ffn_down",
        "post_mlp_layer_norm": "post_ffw_norm",
    },
    head="output",
    unused=r"rope_freqs\.weight",
)
_FUSED_NAMES = dataclasses.replace(
    _NAMES,
    layer={ours: theirs for ours, theirs in _NAMES.layer.items() if ours not in _QKV},
    fused={"attn_qkv": _QKV},
)
_LARGEST = {"gemma2": 46, "gemma3": 62}  # the layers of the 27B models, which scale otherwise


class Metadata:
    """The metadata of one model; the methods raise UserError for missing or wrong values."""

    def __init__(self, values: Mapping[str, Any], tensors: Mapping[str, Any], path: Path):
        self._values = values
        self.tensors = tensors
        self.path = path
        architecture = values.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            raise UserError(
                f"{path}: general.architecture is {repr(architecture)[:80]}; supported: "
                f"{', '.join(ARCHITECTURES)}"
            )
        self.architecture = architecture

    def size(self, key: str, default: int | None = None) -> int:
        """Returns a positive integer of the architecture.

        The file may repeat it for every layer.
        """
        value = self._of(key, default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if type(value) is not int or not 0 < value < 2**31:
            raise self.error(
                f"{self.architecture}.{key} is {repr(value)[:80]}; it must be a positive integer"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Returns a positive number of the architecture, as short as its float32 allows: 1e-05."""
        value = self._of(key, default)
        if type(value) not in (int, float) or not np.isfinite(value) or value <= 0:
            raise self.error(
                f"{self.architecture}.{key} is {repr(value)[:80]}; it must be a positive number"
            )
        return float(str(np.float32(value)))

    def windows(self, window: int, *, period: int) -> tuple[int, ...]:
        """Returns the window of each layer, 0 where it is global.

        The last layer of each ``period`` is global, unless the file says which layers are.
        """
        key = "attention.sliding_window_pattern"
        layers, value = self.size("block_count"), self._of(key, period)
        if isinstance(value, list | np.ndarray) and len(value) == layers:
            local = [bool(each) for each in value]
        elif type(value) is int and 0 <= value < 2**31:
            local = [not value or (i + 1) % value > 0 for i in range(min(layers, 4096))]
        else:
            raise self.error(
                f"{self.architecture}.{key} is {repr(value)[:80]}; it must be a period, or true or "
                f"false for each of {layers} layers"
            )
        return tuple(window if each else 0 for each in local)

    def scaling(self) -> RopeScaling | None:
        """Returns the scaling of rotary positions that the metadata name."""
        # As in llama.cpp, a factor alone is linear; old files have it under another key.
        key, old = "rope.scaling.factor", "rope.scale_linear"
        if self.has(old) and not self.has(key):
            key = old
        kind = self._of("rope.scaling.type", "linear" if self.has(key) else "none")
        if kind in ("none", ""):
            return None
        if kind not in ("linear", "yarn"):
            raise self.error(
                f"{self.architecture}.rope.scaling.type is {repr(kind)[:80]}; supported: none, "
                "linear, yarn"
            )
        if kind == "linear" and self._of(key, 0) == 0:  # as in llama.cpp
            return None
        factor = self.number(key)
        if self.number("rope.scaling.attn_factor", 1.0) != 1:
            raise self.error(f"{self.architecture}.rope.scaling.attn_factor is not supported")
        if kind == "linear":
            return RopeScaling(kind="linear", factor=factor)
        attention_factor = yarn_attention_factor(factor)
        if self.has("rope.scaling.yarn_attn_factor"):
            attention_factor = self.number("rope.scaling.yarn_attn_factor")
        return RopeScaling(
            kind="yarn",
            factor=factor,
            original_max_positions=self.size(
                "rope.scaling.original_context_length", self.size("context_length")
            ),
            attention_factor=attention_factor,
            beta_fast=self.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=self.number("rope.scaling.yarn_beta_slow", 1.0),
        )

    def token_ids(self) -> TokenIds:
        """Returns the ids of padding and of all ends of a text."""
        return token_ids_of(self._values, self.path)

    def bos(self) -> int:
        """Returns the id that begins a text; -1 if there is none."""
        value = self._values.get("tokenizer.ggml.bos_token_id", -1)
        if is_no_token(value):
            return -1
        if type(value) is not int or not 0 <= value < 2**31:
            raise self.error(
                f"tokenizer.ggml.bos_token_id is {repr(value)[:80]}; it must be the id of a token"
            )
        return value

    def error(self, message: str) -> UserError:
        """Returns an error that names the file."""
        return UserError(f"{self.path}: {message}")

    def has(self, key: str) -> bool:
        """Returns whether the file has a field of the architecture."""
        return self._of(key, None) is not None

    def _of(self, key: str, default: Any) -> Any:
        return self._values.get(f"{self.architecture}.{key}", default)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How models of an architecture are stored.

    Attributes:
      model_type: Hugging Face's name of the architecture.
      describe: the fields of the configuration that differ from a Llama's.
      names: of its tensors.
      permuted: the rows of query and key are in the order of interleaved rotary positions.
      norms_plus_one: norms are stored with the 1 that the model adds to them.
    """

    model_type: str
    describe: Callable[[Metadata], dict[str, Any]]
    names: NameTable = _NAMES
    permuted: bool = False
    norms_plus_one: bool = False


def config_of(metadata: Metadata) -> CausalLMConfig:
    """Returns the configuration of a model.

    The caller decides whether its head is tied.
    """
    heads = metadata.size("attention.head_count")
    width = metadata.size("embedding_length")
    head_dim = metadata.size("attention.key_length", max(1, width // heads))
    if metadata.size("attention.value_length", head_dim) != head_dim:
        raise metadata.error("keys and values of different width are not supported")
    vocab_size = metadata.tensors["token_embd.weight"].shape[0]
    token_ids, bos = metadata.token_ids(), metadata.bos()
    for each in (token_ids.pad, *token_ids.all_eos, bos):
        if each >= vocab_size:
            raise metadata.error(f"the id {each} of a special token is not below {vocab_size}")
    architecture = ARCHITECTURES[metadata.architecture]
    fields: dict[str, Any] = {
        "model_type": architecture.model_type,
        "vocab_size": vocab_size,
        "embed_dim": width,
        "num_heads": heads,
        "num_kv_heads": metadata.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "mlp_dim": metadata.size("feed_forward_length"),
        "num_layers": metadata.size("block_count"),
        "max_positions": metadata.size("context_length"),
        "query_scale": head_dim**-0.5,
        "token_ids": token_ids,
        "bos": bos,
    }
    config = CausalLMConfig(**fields | architecture.describe(metadata))
    if config.num_heads % config.num_kv_heads or head_dim % 2:
        raise metadata.error(
            f"{heads} heads of width {head_dim} and {config.num_kv_heads} heads of keys and values "
            "do not go together"
        )
    return config


def permutation(heads: int, head_dim: int) -> np.ndarray:
    """Returns for each row of our query or key its row in the file.

    llama.cpp rotates neighbors, and we rotate halves: within a head, row ``j * K / 2 + i`` of ours
    is row ``2 * i + j`` there.
    """
    rows = np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)


def _rms(metadata: Metadata) -> dict[str, Any]:
    return {
        "norm": "rms",
        "norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.number("rope.freq_base", 10_000.0),
        "rope_scaling": metadata.scaling(),
        "qkv_bias": "blk.0.attn_q.bias" in metadata.tensors,
        "out_bias": "blk.0.attn_output.bias" in metadata.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in metadata.tensors,
    }


def _llama(metadata: Metadata) -> dict[str, Any]:
    fields = _rms(metadata)
    factors = metadata.tensors.get("rope_freqs.weight")
    if factors is not None:
        fields["rope_scaling"] = _llama3_scaling(
            np.asarray(factors.whole(), np.float64), fields["rope_theta"], metadata
        )
    rotary = metadata.size("rope.dimension_count", 2**30)
    head_dim = metadata.size("embedding_length") // metadata.size("attention.head_count")
    if rotary < metadata.size("attention.key_length", head_dim):
        raise metadata.error("rotary positions for a part of a head are not supported")
    return fields


def _llama3_scaling(factors: np.ndarray, theta: float, metadata: Metadata) -> RopeScaling:
    """Returns Llama 3.1's scaling from the factors that its files hold."""
    scaling = RopeScaling(kind="llama3", factor=float(factors.max()))
    wavelengths = 2 * np.pi * theta ** (np.arange(len(factors)) / len(factors))
    longest = scaling.original_max_positions
    smooth = (longest / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = np.clip(smooth, 0.0, 1.0)
    expected = 1 / ((1 - smooth) / scaling.factor + smooth)
    if not np.allclose(factors, expected, rtol=1e-4):
        raise metadata.error("rope_freqs.weight is not Llama 3's scaling of rotary positions")
    return scaling


def _qwen3(metadata: Metadata) -> dict[str, Any]:
    return _rms(metadata) | {"qk_norm": "head"}


def _gemma(metadata: Metadata) -> dict[str, Any]:
    width, heads = metadata.size("embedding_length"), metadata.size("attention.head_count")
    fields = _rms(metadata) | {
        "norm": "rms_plus_one",
        "post_norms": True,
        "mlp_activations": ("gelu", "linear"),
        "embedding_scale": width**0.5,
    }
    if metadata.size("block_count") == _LARGEST[metadata.architecture]:
        fields["query_scale"] = (width // heads) ** -0.5
    return fields


def _gemma2(metadata: Metadata) -> dict[str, Any]:
    return _gemma(metadata) | {
        "windows": metadata.windows(metadata.size("attention.sliding_window", 4096), period=2),
        "attention_softcap": metadata.number("attn_logit_softcapping", 50.0),
        "logits_softcap": metadata.number("final_logit_softcapping", 30.0),
    }


def _gemma3(metadata: Metadata) -> dict[str, Any]:
    windows: tuple[int, ...] = ()  # all layers are global
    if metadata.has("attention.sliding_window"):
        windows = metadata.windows(metadata.size("attention.sliding_window"), period=6)
    return _gemma(metadata) | {
        "windows": windows,
        "rope_theta": metadata.number("rope.freq_base", 1_000_000.0),
        "rope_local_theta": metadata.number("rope.freq_base_swa", 10_000.0),
        "qk_norm": "head",
        "logits_softcap": metadata.number("final_logit_softcapping")
        if metadata.has("final_logit_softcapping")
        else 0.0,
    }


def _layer_norm(metadata: Metadata) -> dict[str, Any]:
    return {
        "norm": "layer",
        "norm_eps": metadata.number("attention.layer_norm_epsilon"),
        "mlp_activations": ("gelu",),
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
    }


def _gpt2(metadata: Metadata) -> dict[str, Any]:
    return _layer_norm(metadata) | {"positions": "learned"}


def _bloom(metadata: Metadata) -> dict[str, Any]:
    return _layer_norm(metadata) | {"positions": "alibi", "embedding_norm": True}


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(model_type="llama", describe=_llama, permuted=True),
    "qwen2": Architecture(model_type="qwen2", describe=_rms),
    "qwen3": Architecture(model_type="qwen3", describe=_qwen3),
    "gemma2": Architecture(model_type="gemma2", describe=_gemma2, norms_plus_one=True),
    "gemma3": Architecture(model_type="gemma3_text", describe=_gemma3, norms_plus_one=True),
    "gpt2": Architecture(model_type="gpt2", describe=_gpt2, names=_FUSED_NAMES),
    "bloom": Architecture(model_type="bloom", describe=_bloom, names=_FUSED_NAMES),
}
