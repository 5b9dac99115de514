"""Families with LayerNorm: GPT-2, BLOOM, GPT-NeoX (Pythia), OPT and Phi.

Defaults are those of transformers' configuration_*.py (4.57 and 5.24 agree).
"""

from collections.abc import Mapping
from typing import Any

from prompt_tuning_jax.checkpoints.hf.config_fields import ConfigFields
from prompt_tuning_jax.checkpoints.hf.families.base import (
    Family,
    all_heads,
    head_width,
    root_of_width,
)
from prompt_tuning_jax.checkpoints.hf.names import NameTable

_QKV = ("self_attention/query", "self_attention/key", "self_attention/value")


def _four_widths(fields: Mapping[str, Any]) -> int:
    width: int = 4 * fields["embed_dim"]
    return width


def _usual_heads(c: ConfigFields) -> None:
    c.fixed(num_kv_heads=all_heads, head_dim=head_width, query_scale=root_of_width)


def _gpt2(c: ConfigFields) -> None:
    c.size("vocab_size", "vocab_size", 50_257)
    c.size("embed_dim", "n_embd", 768, ("hidden_size",))
    c.size("num_layers", "n_layer", 12, ("num_hidden_layers",))
    c.size("num_heads", "n_head", 12, ("num_attention_heads",))
    c.size("max_positions", "n_positions", 1024, ("max_position_embeddings",))
    c.size("mlp_dim", "n_inner", _four_widths)
    c.activation("activation_function", "gelu_new", gated=False)
    c.number("norm_eps", "layer_norm_epsilon", 1e-5)
    c.only("scale_attn_weights", True, otherwise="attention without a scale")
    c.only("scale_attn_by_inverse_layer_idx", False, otherwise="a scale that differs by layer")
    c.only("add_cross_attention", False, otherwise="cross attention")
    c.flag("tie_embeddings", "tie_word_embeddings", True)
    _usual_heads(c)
    c.fixed(norm="layer", positions="learned", qkv_bias=True, out_bias=True, mlp_bias=True)
    c.tokens(pad=None, bos=50_256, eos=50_256)


_GPT2_NAMES = NameTable(
    prefixes=("transformer.", ""),
    outside={
        "token_embedder": "wte",
        "position_embedder": "wpe",
        "decoder/decoder_norm": "ln_f",
    },
    layers="h",
    layer={
        "pre_self_attention_layer_norm": "ln_1",
        "self_attention/out": "attn.c_proj",
        "pre_mlp_layer_norm": "ln_2",
        "mlp/wi": "mlp.c_fc",
        "mlp/wo": "mlp.c_proj",
    },
    fused={"attn.c_attn": _QKV},
    kernels_as_here=True,
    unused=r"h\.\d+\.attn\.(masked_)?bias",
)


def _bloom(c: ConfigFields) -> None:
    c.size("vocab_size", "vocab_size", 250_880)
    c.size("embed_dim", "hidden_size", 64, ("n_embed",))
    c.size("num_layers", "n_layer", 2, ("num_hidden_layers",))
    c.size("num_heads", "n_head", 8, ("num_attention_heads",))
    # Its positions have no limit; the published models were trained on this length.
    c.size("max_positions", "seq_length", 2048)
    c.number("norm_eps", "layer_norm_epsilon", 1e-5)
    c.only(
        "apply_residual_connection_post_layernorm",
        False,
        otherwise="a residual connection after the norm",
    )
    c.flag("tie_embeddings", "tie_word_embeddings", True)
    _usual_heads(c)
    c.fixed(mlp_dim=_four_widths, mlp_activations=("gelu",), norm="layer", embedding_norm=True)
    c.fixed(positions="alibi", qkv_bias=True, out_bias=True, mlp_bias=True)
    c.tokens(pad=None, bos=1, eos=2)


_BLOOM_NAMES = NameTable(
    prefixes=("transformer.", ""),
    outside={
        "token_embedder": "word_embeddings",
        "embedding_norm": "word_embeddings_layernorm",
        "decoder/decoder_norm": "ln_f",
    },
    layers="h",
    layer={
        "pre_self_attention_layer_norm": "input_layernorm",
        "self_attention/out": "self_attention.dense",
        "pre_mlp_layer_norm": "post_attention_layernorm",
        "mlp/wi": "mlp.dense_h_to_4h",
        "mlp/wo": "mlp.dense_4h_to_h",
    },
    fused={"self_attention.query_key_value": _QKV},
    fused_by_head=True,
)


def _gpt_neox(c: ConfigFields) -> None:
    c.size("vocab_size", "vocab_size", 50_432)
    c.size("embed_dim", "hidden_size", 6144)
    c.size("num_layers", "num_hidden_layers", 44)
    c.size("num_heads", "num_attention_heads", 64)
    c.size("mlp_dim", "intermediate_size", 24_576)
    c.size("max_positions", "max_position_embeddings", 2048)
    c.activation("hidden_act", "gelu", gated=False)
    c.number("norm_eps", "layer_norm_eps", 1e-5)
    c.flag("parallel_residual", "use_parallel_residual", True)
    c.flag("qkv_bias", "attention_bias", True)
    c.flag("out_bias", "attention_bias", True)
    c.flag("tie_embeddings", "tie_word_embeddings", False)
    _usual_heads(c)
    c.fixed(norm="layer", mlp_bias=True)
    c.rope(theta_key="rotary_emb_base", rotary_key="rotary_pct", rotary=0.25)
    c.tokens(pad=None, bos=0, eos=2)


_GPT_NEOX_NAMES = NameTable(
    prefixes=("gpt_neox.", ""),
    outside={"token_embedder": "embed_in", "decoder/decoder_norm": "final_layer_norm"},
    layer={
        "pre_self_attention_layer_norm": "input_layernorm",
        "self_attention/out": "attention.dense",
        "pre_mlp_layer_norm": "post_attention_layernorm",
        "mlp/wi": "mlp.dense_h_to_4h",
        "mlp/wo": "mlp.dense_4h_to_h",
    },
    head="embed_out",
    fused={"attention.query_key_value": _QKV},
    fused_by_head=True,
    unused=r"layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",
)


def _opt(c: ConfigFields) -> None:
    c.size("vocab_size", "vocab_size", 50_272)
    c.size("embed_dim", "hidden_size", 768)
    c.size("num_layers", "num_hidden_layers", 12)
    c.size("num_heads", "num_attention_heads", 12)
    c.size("mlp_dim", "ffn_dim", 3072)
    c.size("max_positions", "max_position_embeddings", 2048)
    c.activation("activation_function", "relu", gated=False)
    c.only("do_layer_norm_before", True, otherwise="a norm after the residual connection")
    c.only("layer_norm_elementwise_affine", True, otherwise="a norm without weights")
    c.only("_remove_final_layer_norm", False, otherwise="a model without its last norm")
    c.same("word_embed_proj_dim", "embed_dim", otherwise="an embedding of another width")
    for field in ("qkv_bias", "out_bias", "mlp_bias"):
        c.flag(field, "enable_bias", True)
    c.flag("tie_embeddings", "tie_word_embeddings", True)
    _usual_heads(c)
    c.fixed(norm="layer", norm_eps=1e-5, positions="learned", position_offset=2)
    c.tokens(pad=1, bos=2, eos=2)


_OPT_NAMES = NameTable(
    prefixes=("model.decoder.", "decoder."),
    outside={
        "token_embedder": "embed_tokens",
        "position_embedder": "embed_positions",
        "decoder/decoder_norm": "final_layer_norm",
    },
    layer={
        "pre_self_attention_layer_norm": "self_attn_layer_norm",
        "self_attention/query": "self_attn.q_proj",
        "self_attention/key": "self_attn.k_proj",
        "self_attention/value": "self_attn.v_proj",
        "self_attention/out": "self_attn.out_proj",
        "pre_mlp_layer_norm": "final_layer_norm",
        "mlp/wi": "fc1",
        "mlp/wo": "fc2",
    },
)


def _phi(c: ConfigFields) -> None:
    c.size("vocab_size", "vocab_size", 51_200)
    c.size("embed_dim", "hidden_size", 2048)
    c.size("num_layers", "num_hidden_layers", 24)
    c.size("num_heads", "num_attention_heads", 32)
    c.size("num_kv_heads", "num_key_value_heads", all_heads)
    c.size("mlp_dim", "intermediate_size", 8192)
    c.size("max_positions", "max_position_embeddings", 2048)
    c.activation("hidden_act", "gelu_new", gated=False)
    c.number("norm_eps", "layer_norm_eps", 1e-5)
    c.only("qk_layernorm", False, otherwise="a norm of queries and keys")
    c.flag("tie_embeddings", "tie_word_embeddings", False)
    c.size("head_dim", "head_dim", head_width)
    c.fixed(query_scale=root_of_width, norm="layer")
    c.fixed(parallel_residual=True, shared_norm=True, logits_bias=True)
    c.fixed(qkv_bias=True, out_bias=True, mlp_bias=True)
    c.rope(rotary_key="partial_rotary_factor", rotary=0.5)
    c.tokens(pad=None, bos=1, eos=2)


_PHI_NAMES = NameTable(
    prefixes=("model.", ""),
    outside={"token_embedder": "embed_tokens", "decoder/decoder_norm": "final_layernorm"},
    layer={
        "pre_self_attention_layer_norm": "input_layernorm",
        "self_attention/query": "self_attn.q_proj",
        "self_attention/key": "self_attn.k_proj",
        "self_attention/value": "self_attn.v_proj",
        "self_attention/out": "self_attn.dense",
        "mlp/wi": "mlp.fc1",
        "mlp/wo": "mlp.fc2",
    },
)

GPT2 = Family(architecture="GPT2LMHeadModel", describe=_gpt2, names=_GPT2_NAMES)
BLOOM = Family(architecture="BloomForCausalLM", describe=_bloom, names=_BLOOM_NAMES)
GPT_NEOX = Family(architecture="GPTNeoXForCausalLM", describe=_gpt_neox, names=_GPT_NEOX_NAMES)
OPT = Family(architecture="OPTForCausalLM", describe=_opt, names=_OPT_NAMES)
PHI = Family(architecture="PhiForCausalLM", describe=_phi, names=_PHI_NAMES)
