"""Small GGUF files, converted from Hugging Face folders as llama.cpp's converter does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from prompt_tuning_jax.checkpoints.hf.pretrained import read_hf
from prompt_tuning_jax.models.causal_lm.config import CausalLMConfig
from prompt_tuning_jax.typing import HostArray

# Their architecture, by the model_type of the folder.
ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "bloom": "bloom",
}
_LAYER = {
    "pre_self_attention_layer_norm": "attn_norm",
    "post_self_attention_layer_norm": "post_attention_norm",
    "pre_mlp_layer_norm": "ffn_norm",
    "post_mlp_layer_norm": "post_ffw_norm",
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "out": "attn_output",
    "query_norm": "attn_q_norm",
    "key_norm": "attn_k_norm",
    "wi_0": "ffn_gate",
    "wi_1": "ffn_up",
    "wi": "ffn_up",
    "wo": "ffn_down",
}
_OUTSIDE = {
    "token_embedder": "token_embd",
    "position_embedder": "position_embd",
    "embedding_norm": "token_embd_norm",
    "decoder/decoder_norm": "output_norm",
    "decoder/logits_dense": "output",
}


def gguf_tensors(config: CausalLMConfig, params: Mapping[str, HostArray]) -> dict[str, HostArray]:
    """The tensors of such a file, by name, in the order of its rows."""
    tensors: dict[str, HostArray] = {}
    fused = config.model_type in ("gpt2", "bloom")
    for name, array in params.items():
        module, _, leaf = name.rpartition("/")
        if module in _OUTSIDE:
            stored, theirs = array, _OUTSIDE[module]
        else:
            _, layer, *rest = module.split("/")
            theirs = f"blk.{layer.removeprefix('layers_')}.{_LAYER[rest[-1]]}"
            stored = array
        stored = stored.T if leaf == "kernel" else stored
        if config.model_type == "llama" and theirs.endswith(("attn_q", "attn_k")):
            width = config.head_dim
            halves = stored.reshape(-1, 2, width // 2, *stored.shape[1:])
            stored = halves.swapaxes(1, 2).reshape(stored.shape)
        if config.model_type.startswith("gemma") and leaf == "scale":
            stored = stored + np.float32(1)
        tensors[f"{theirs}.{'bias' if leaf == 'bias' else 'weight'}"] = np.ascontiguousarray(stored)
    if fused:
        for i in range(config.num_layers):
            for leaf in ("weight", "bias"):
                parts = [tensors.pop(f"blk.{i}.attn_{part}.{leaf}") for part in "qkv"]
                tensors[f"blk.{i}.attn_qkv.{leaf}"] = np.concatenate(parts)
    return tensors


def gguf_metadata(config: CausalLMConfig) -> dict[str, Any]:
    """The metadata of the model, without the prefix of its architecture."""
    eps = "layer_norm_epsilon" if config.norm == "layer" else "layer_norm_rms_epsilon"
    values: dict[str, Any] = {
        "block_count": config.num_layers,
        "context_length": config.max_positions,
        "embedding_length": config.embed_dim,
        "feed_forward_length": config.mlp_dim,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        f"attention.{eps}": config.norm_eps,
    }
    if config.positions == "rope":
        values["rope.freq_base"] = config.rope_theta
    if any(config.windows):
        values["attention.sliding_window"] = max(config.windows)
    if config.attention_softcap:
        values["attn_logit_softcapping"] = config.attention_softcap
        values["final_logit_softcapping"] = config.logits_softcap
    return values


def write_gguf(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, HostArray],
    *,
    eos: int | None = 2,
    vocab_size: int = 0,
    types: Mapping[str, gguf.GGMLQuantizationType] | None = None,
) -> Path:
    """Writes a file; ``types`` are of tensors given as the bytes of their blocks."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        name = key if key.startswith(("split.", "tokenizer.")) else f"{architecture}.{key}"
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, int):
            (writer.add_int32 if value < 0 else writer.add_uint32)(name, value)
        else:
            writer.add_float32(name, value)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    tokens = [f"t{i}" for i in range(vocab_size)]
    tokens[-3:] = ["a", "b", "ab"]
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.merges", ["a b"])
    if eos is not None:
        writer.add_uint32("tokenizer.ggml.eos_token_id", eos)
    for name, array in tensors.items():
        kind = (types or {}).get(name)
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_of(folder: Path, path: Path) -> tuple[Path, CausalLMConfig, dict[str, HostArray]]:
    """A folder as a GGUF file; returns it with the folder's configuration and parameters."""
    config, params, _ = read_hf(folder)
    assert isinstance(config, CausalLMConfig)
    write_gguf(
        path,
        ARCHITECTURES[config.model_type],
        gguf_metadata(config),
        gguf_tensors(config, params),
        eos=config.token_ids.eos,
        vocab_size=config.vocab_size,
    )
    return path, config, params
