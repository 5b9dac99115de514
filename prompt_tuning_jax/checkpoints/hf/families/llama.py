"""Llama and the families with its names: Mistral, Qwen 2 and 3, OLMo.

Defaults are those of transformers' configuration_*.py (4.57 and 5.24 agree).
"""

from prompt_tuning_jax.checkpoints.hf.config_fields import ConfigFields
from prompt_tuning_jax.checkpoints.hf.families.base import (
    Family,
    all_heads,
    head_width,
    root_of_width,
)
from prompt_tuning_jax.checkpoints.hf.names import NameTable

LAYER = {
    "pre_self_attention_layer_norm": "input_layernorm",
    "self_attention/query": "self_attn.q_proj",
    "self_attention/key": "self_attn.k_proj",
    "self_attention/value": "self_attn.v_proj",
    "self_attention/out": "self_attn.o_proj",
    "self_attention/query_norm": "self_attn.q_norm",
    "self_attention/key_norm": "self_attn.k_norm",
    "pre_mlp_layer_norm": "post_attention_layernorm",
    "mlp/wi_0": "mlp.gate_proj",
    "mlp/wi_1": "mlp.up_proj",
    "mlp/wo": "mlp.down_proj",
}
NAMES = NameTable(
    prefixes=("model.", ""),
    outside={"token_embedder": "embed_tokens", "decoder/decoder_norm": "norm"},
    layer=LAYER,
)


def sizes(
    c: ConfigFields,
    *,
    vocab: int,
    mlp: int,
    longest: int,
    width: int = 4096,
    layers: int = 32,
    heads: int = 32,
) -> None:
    """The sizes that all these families have, under the same keys."""
    c.size("vocab_size", "vocab_size", vocab)
    c.size("embed_dim", "hidden_size", width)
    c.size("mlp_dim", "intermediate_size", mlp)
    c.size("num_layers", "num_hidden_layers", layers)
    c.size("num_heads", "num_attention_heads", heads)
    c.size("max_positions", "max_position_embeddings", longest)


def _llama(c: ConfigFields) -> None:
    sizes(c, vocab=32_000, mlp=11_008, longest=2048)
    c.size("num_kv_heads", "num_key_value_heads", all_heads)
    c.size("head_dim", "head_dim", head_width)
    c.activation("hidden_act", "silu", gated=True)
    c.number("norm_eps", "rms_norm_eps", 1e-6)
    c.flag("qkv_bias", "attention_bias", False)
    c.flag("out_bias", "attention_bias", False)
    c.flag("mlp_bias", "mlp_bias", False)
    c.flag("tie_embeddings", "tie_word_embeddings", False)
    c.rope()
    c.fixed(norm="rms", query_scale=root_of_width)
    c.tokens(pad=None, bos=1, eos=2)


def _mistral(c: ConfigFields) -> None:
    sizes(c, vocab=32_000, mlp=14_336, longest=131_072)
    c.size("num_kv_heads", "num_key_value_heads", 8)
    c.size("head_dim", "head_dim", head_width)
    c.activation("hidden_act", "silu", gated=True)
    c.number("norm_eps", "rms_norm_eps", 1e-6)
    c.windows("all", default=4096)
    c.flag("tie_embeddings", "tie_word_embeddings", False)
    c.rope()
    c.fixed(norm="rms", query_scale=root_of_width)
    c.tokens(pad=None, bos=1, eos=2)


def _qwen2(c: ConfigFields) -> None:
    sizes(c, vocab=151_936, mlp=22_016, longest=32_768)
    c.size("num_kv_heads", "num_key_value_heads", 32)
    c.activation("hidden_act", "silu", gated=True)
    c.number("norm_eps", "rms_norm_eps", 1e-6)
    c.windows("last", default=4096)
    c.flag("tie_embeddings", "tie_word_embeddings", False)
    c.size("head_dim", "head_dim", head_width)
    c.fixed(norm="rms", qkv_bias=True, query_scale=root_of_width)
    c.rope()
    c.tokens(pad=None, bos=None, eos=None)


def _qwen3(c: ConfigFields) -> None:
    sizes(c, vocab=151_936, mlp=22_016, longest=32_768)
    c.size("num_kv_heads", "num_key_value_heads", 32)
    c.size("head_dim", "head_dim", 128)
    c.activation("hidden_act", "silu", gated=True)
    c.number("norm_eps", "rms_norm_eps", 1e-6)
    c.flag("qkv_bias", "attention_bias", False)
    c.flag("out_bias", "attention_bias", False)
    c.windows("last", default=4096)
    c.flag("tie_embeddings", "tie_word_embeddings", False)
    c.rope()
    c.fixed(norm="rms", qk_norm="head", query_scale=root_of_width)
    c.tokens(pad=None, bos=None, eos=None)


def _olmo(c: ConfigFields) -> None:
    sizes(c, vocab=50_304, mlp=11_008, longest=2048)
    c.size("num_kv_heads", "num_key_value_heads", all_heads)
    c.activation("hidden_act", "silu", gated=True)
    c.flag("qkv_bias", "attention_bias", False)
    c.flag("out_bias", "attention_bias", False)
    c.number("qkv_clip", "clip_qkv", 0.0, or_none=True)
    c.flag("tie_embeddings", "tie_word_embeddings", False)
    c.size("head_dim", "head_dim", head_width)
    c.fixed(query_scale=root_of_width)
    c.fixed(norm="layer_without_weights", norm_eps=1e-5)
    c.rope()
    c.tokens(pad=1, bos=None, eos=50_279)


LLAMA = Family(architecture="LlamaForCausalLM", describe=_llama, names=NAMES)
MISTRAL = Family(architecture="MistralForCausalLM", describe=_mistral, names=NAMES)
QWEN2 = Family(architecture="Qwen2ForCausalLM", describe=_qwen2, names=NAMES)
QWEN3 = Family(architecture="Qwen3ForCausalLM", describe=_qwen3, names=NAMES)
OLMO = Family(architecture="OlmoForCausalLM", describe=_olmo, names=NAMES)
