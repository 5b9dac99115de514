"""Gemma 2, and the text part of Gemma 3.

Defaults are those of transformers' configuration_*.py (4.57 and 5.24 agree).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from prompt_tuning_jax.checkpoints.hf.config_fields import ConfigFields
from prompt_tuning_jax.checkpoints.hf.families import llama
from prompt_tuning_jax.checkpoints.hf.families.base import Family

LAYER = {
    **llama.LAYER,
    "post_self_attention_layer_norm": "post_attention_layernorm",
    "pre_mlp_layer_norm": "pre_feedforward_layernorm",
    "post_mlp_layer_norm": "post_feedforward_layernorm",
}
_NAMES = dataclasses.replace(llama.NAMES, layer=LAYER)
_BIDIRECTIONAL = "attention in both directions"


def _embedding_scale(fields: Mapping[str, Any]) -> float:
    scale: float = fields["embed_dim"] ** 0.5
    return scale


def _stack(c: ConfigFields, *, vocab: int, longest: int) -> None:
    """What the layers of all these families have, under the same keys."""
    llama.sizes(c, vocab=vocab, mlp=9216, longest=longest, width=2304, layers=26, heads=8)
    c.size("num_kv_heads", "num_key_value_heads", 4)
    c.size("head_dim", "head_dim", 256)
    c.activation("hidden_activation", "gelu_pytorch_tanh", gated=True)
    c.number("norm_eps", "rms_norm_eps", 1e-6)
    c.flag("qkv_bias", "attention_bias", False)
    c.flag("out_bias", "attention_bias", False)
    c.query_scale("query_pre_attn_scalar", 256)
    c.fixed(norm="rms_plus_one", post_norms=True, embedding_scale=_embedding_scale)


def gemma2_stack(c: ConfigFields) -> None:
    """The layers of Gemma 2."""
    _stack(c, vocab=256_000, longest=8192)
    c.number("attention_softcap", "attn_logit_softcapping", 50.0, or_none=True)
    c.number("logits_softcap", "final_logit_softcapping", 30.0, or_none=True)
    c.windows("alternating", default=4096)
    c.rope()


def gemma3_stack(c: ConfigFields) -> None:
    """The layers of Gemma 3."""
    _stack(c, vocab=262_208, longest=131_072)
    c.number("logits_softcap", "final_logit_softcapping", 0.0, or_none=True)
    c.windows("five_of_six", default=4096)
    c.rope_by_layer_type(theta=1_000_000.0, local_theta=10_000.0)
    c.fixed(qk_norm="head")


def _gemma2(c: ConfigFields) -> None:
    gemma2_stack(c)
    c.only("use_bidirectional_attention", None, otherwise=_BIDIRECTIONAL)
    c.flag("tie_embeddings", "tie_word_embeddings", True)
    c.tokens(pad=0, bos=2, eos=1)


def _gemma3(c: ConfigFields) -> None:
    gemma3_stack(c)
    # The key attn_logit_softcapping is there, but transformers' model does not use it.
    c.fixed(attention_softcap=0.0)
    c.only("use_bidirectional_attention", False, otherwise=_BIDIRECTIONAL)
    c.flag("tie_embeddings", "tie_word_embeddings", True)
    c.tokens(pad=0, bos=2, eos=1)


GEMMA2 = Family(architecture="Gemma2ForCausalLM", describe=_gemma2, names=_NAMES)
GEMMA3_TEXT = Family(architecture="Gemma3ForCausalLM", describe=_gemma3, names=_NAMES)
# Of the models that read images, too, the language model alone.
GEMMA3 = dataclasses.replace(
    GEMMA3_TEXT,
    text_type="gemma3_text",
    names=dataclasses.replace(
        _NAMES,
        prefixes=("model.language_model.", "language_model.model.", "model.", ""),
        unused=r"(vision_tower|multi_modal_projector)\..*",
    ),
)
