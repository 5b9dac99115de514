"""Published T5Gemma models by their names on the Hugging Face hub."""

from dataclasses import replace

from prompt_tuning_jax.models.causal_lm.config import CausalLMConfig, RopeScaling
from prompt_tuning_jax.models.config import TokenIds
from prompt_tuning_jax.models.t5gemma.config import T5GemmaConfig

_IDS = TokenIds(pad=0, eos=1, start=2, inputs_have_eos=False)


def _stack(
    embed_dim: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    mlp_dim: int,
    windows: tuple[int, ...],
    *,
    model_type: str = "t5_gemma_module",
    vocab_size: int = 256_000,
    max_positions: int = 8192,
) -> CausalLMConfig:
    return CausalLMConfig(
        model_type=model_type,
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        mlp_dim=mlp_dim,
        num_layers=len(windows),
        max_positions=max_positions,
        mlp_activations=("gelu", "linear"),
        norm="rms_plus_one",
        post_norms=True,
        embedding_scale=embed_dim**0.5,
        windows=windows,
        query_scale=head_dim**-0.5,
        tie_embeddings=True,
    )


def _gemma_2(
    embed_dim: int, num_heads: int, num_kv_heads: int, head_dim: int, mlp_dim: int, layers: int
) -> CausalLMConfig:
    base = _stack(
        *(embed_dim, num_heads, num_kv_heads, head_dim, mlp_dim), (4096, 0) * (layers // 2)
    )
    return replace(base, attention_softcap=50.0, logits_softcap=30.0)


def _t5gemma(encoder: CausalLMConfig, decoder: CausalLMConfig) -> T5GemmaConfig:
    return T5GemmaConfig(
        model_type="t5gemma",
        encoder=replace(encoder, tie_embeddings=False),
        decoder=decoder,
        token_ids=_IDS,
    )


def _t5gemma_2(
    embed_dim: int,
    num_heads: int,
    num_kv_heads: int,
    mlp_dim: int,
    layers: int,
    *,
    window: int = 512,
    rope_scaling: RopeScaling | None = None,
) -> T5GemmaConfig:
    windows = tuple(0 if (i + 1) % 6 == 0 else window for i in range(layers))
    base = _stack(
        *(embed_dim, num_heads, num_kv_heads, 256, mlp_dim, windows),
        vocab_size=262_144,
        max_positions=131_072,
    )
    decoder = replace(
        base,
        model_type="t5gemma2_decoder",
        qk_norm="head",
        rope_theta=1_000_000.0,
        rope_local_theta=10_000.0,
        rope_scaling=rope_scaling,
    )
    return T5GemmaConfig(
        model_type="t5gemma2",
        encoder=replace(decoder, model_type="t5gemma2_text", tie_embeddings=False),
        decoder=decoder,
        eoi=256_000,
        token_ids=replace(_IDS, image=256_001),
    )


_2B = _gemma_2(2304, 8, 4, 256, 9216, 26)
_9B = _gemma_2(3584, 16, 8, 256, 14_336, 42)
_SMALL = _gemma_2(512, 8, 8, 64, 1024, 8)
_BASE = _gemma_2(768, 12, 12, 64, 2048, 12)
_LARGE = _gemma_2(1024, 16, 16, 64, 2816, 24)
_ML = _gemma_2(1152, 4, 4, 256, 6912, 26)
_XL = _gemma_2(2048, 32, 32, 64, 5120, 24)
# google-deepmind/gemma, research/t5gemma/config.py; the hub's files have tables of 256,000 rows.
SIZES: dict[str, T5GemmaConfig] = {
    "s-s": _t5gemma(_SMALL, _SMALL),
    "b-b": _t5gemma(_BASE, _BASE),
    "l-l": _t5gemma(_LARGE, _LARGE),
    "ml-ml": _t5gemma(_ML, _ML),
    "xl-xl": _t5gemma(_XL, _XL),
    "2b-2b": _t5gemma(_2B, _2B),
    "9b-2b": _t5gemma(_9B, _2B),
    "9b-9b": _t5gemma(_9B, _9B),
    "2-270m-270m": _t5gemma_2(640, 4, 1, 2048, 18),
    "2-1b-1b": _t5gemma_2(1152, 4, 1, 6912, 26),
    "2-4b-4b": _t5gemma_2(
        2560, 8, 4, 10_240, 34, window=1024, rope_scaling=RopeScaling(kind="linear", factor=8.0)
    ),
}
# T5Gemma 2 comes in one variant.
PRESETS: dict[str, T5GemmaConfig] = {
    f"google/t5gemma-{size}{variant}": config
    for size, config in SIZES.items()
    for variant in ([""] if config.merged else ["-prefixlm", "-prefixlm-it", "-ul2", "-ul2-it"])
}
