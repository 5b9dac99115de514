"""T5Gemma and the text part of T5Gemma 2.

Defaults are those of transformers' configuration_t5gemma.py (4.57 and 5.24 agree) and
configuration_t5gemma2.py (5.24; version 4 does not know the model).
"""

from collections.abc import Callable
from dataclasses import dataclass

from prompt_tuning_jax.checkpoints.hf.config_fields import ConfigFields
from prompt_tuning_jax.checkpoints.hf.families import gemma
from prompt_tuning_jax.checkpoints.hf.names import NameTable


@dataclass(frozen=True, kw_only=True)
class T5GemmaFamily:
    """A family of encoder-decoders.

    Attributes:
      architecture: transformers' class.
      describe: what ``config.json`` says of a stack.
      encoder_type: the ``model_type`` of the encoder's stack.
      decoder_type: that of the decoder's.
      names: of its tensors.
    """

    architecture: str
    describe: Callable[[ConfigFields], None]
    encoder_type: str
    decoder_type: str
    names: NameTable


_LAYER = {
    **gemma.LAYER,
    "pre_self_attention_layer_norm": "pre_self_attn_layernorm",
    "post_self_attention_layer_norm": "post_self_attn_layernorm",
}
_TABLES = {"token_embedder": "encoder.embed_tokens", "decoder_embedder": "decoder.embed_tokens"}
_NORMS = {"encoder/encoder_norm": "encoder.norm", "decoder/decoder_norm": "decoder.norm"}


def _t5gemma2_stack(c: ConfigFields) -> None:
    gemma.gemma3_stack(c)
    # The key attn_logit_softcapping is there, but transformers' model does not use it.
    c.fixed(attention_softcap=0.0)


T5GEMMA = T5GemmaFamily(
    architecture="T5GemmaForConditionalGeneration",
    describe=gemma.gemma2_stack,
    encoder_type="t5_gemma_module",
    decoder_type="t5_gemma_module",
    names=NameTable(
        prefixes=("model.", ""),
        outside={**_TABLES, **_NORMS},
        layers="decoder.layers",
        encoder_layers="encoder.layers",
        layer={
            **_LAYER,
            "pre_cross_attention_layer_norm": "pre_cross_attn_layernorm",
            "encoder_decoder_attention/query": "cross_attn.q_proj",
            "encoder_decoder_attention/key": "cross_attn.k_proj",
            "encoder_decoder_attention/value": "cross_attn.v_proj",
            "encoder_decoder_attention/out": "cross_attn.o_proj",
            "post_cross_attention_layer_norm": "post_cross_attn_layernorm",
        },
        head="lm_head.out_proj",
    ),
)
_TABLE, _EOI = "embed_tokens.weight", "embed_tokens.eoi_embedding"
T5GEMMA2 = T5GemmaFamily(
    architecture="T5Gemma2ForConditionalGeneration",
    describe=_t5gemma2_stack,
    encoder_type="t5gemma2_text",
    decoder_type="t5gemma2_decoder",
    names=NameTable(
        prefixes=("model.", ""),
        outside={**_TABLES, **_NORMS},
        arrays={"eoi_embedding": f"encoder.{_EOI}", "decoder_eoi_embedding": f"decoder.{_EOI}"},
        layers="decoder.layers",
        encoder_layers="encoder.layers",
        # The module's name in transformers; files leave it out.
        inside={"encoder.text_model.": "encoder."},
        copies={f"decoder.{_TABLE}": f"encoder.{_TABLE}", f"decoder.{_EOI}": f"encoder.{_EOI}"},
        layer=_LAYER,
        head="lm_head.out_proj",
        # What reads images.
        unused=r"encoder\.(vision_tower|multi_modal_projector)\..*",
    ),
)
