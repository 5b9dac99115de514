"""Published decoder-only models by their names on the Hugging Face hub."""

from dataclasses import replace

from prompt_tuning_jax.models.causal_lm.config import CausalLMConfig, RopeScaling
from prompt_tuning_jax.models.config import TokenIds


def _llama(
    embed_dim: int,
    num_heads: int,
    num_kv_heads: int,
    mlp_dim: int,
    num_layers: int,
    *,
    vocab_size: int,
    max_positions: int,
    rope_theta: float,
    eos: int,
    head_dim: int = 0,
    rope_factor: float = 0.0,
    tie_embeddings: bool = True,
) -> CausalLMConfig:
    head_dim = head_dim or embed_dim // num_heads
    scaling = RopeScaling(kind="llama3", factor=rope_factor) if rope_factor else None
    return CausalLMConfig(
        model_type="llama",
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        mlp_dim=mlp_dim,
        num_layers=num_layers,
        max_positions=max_positions,
        norm_eps=1e-5,
        rope_theta=rope_theta,
        rope_scaling=scaling,
        query_scale=head_dim**-0.5,
        tie_embeddings=tie_embeddings,
        token_ids=TokenIds(pad=eos, eos=eos, start=-1),
    )


def _smollm2(
    embed_dim: int, num_heads: int, num_kv_heads: int, mlp_dim: int, num_layers: int
) -> CausalLMConfig:
    return _llama(
        *(embed_dim, num_heads, num_kv_heads, mlp_dim, num_layers),
        vocab_size=49_152,
        max_positions=8192,
        rope_theta=100_000.0,
        eos=0,
    )


def _llama_3(
    embed_dim: int,
    num_heads: int,
    mlp_dim: int,
    num_layers: int,
    *,
    rope_factor: float,
    tie_embeddings: bool = True,
) -> CausalLMConfig:
    return _llama(
        *(embed_dim, num_heads, 8, mlp_dim, num_layers),
        vocab_size=128_256,
        max_positions=131_072,
        rope_theta=500_000.0,
        eos=128_001,
        rope_factor=rope_factor,
        tie_embeddings=tie_embeddings,
    )


def _qwen_2_5(embed_dim: int, num_heads: int, mlp_dim: int, num_layers: int) -> CausalLMConfig:
    base = _llama(
        *(embed_dim, num_heads, 2, mlp_dim, num_layers),
        vocab_size=151_936,
        max_positions=32_768,
        rope_theta=1_000_000.0,
        eos=151_643,
    )
    return replace(base, model_type="qwen2", norm_eps=1e-6, qkv_bias=True)


def _qwen_3(embed_dim: int, num_heads: int, mlp_dim: int, num_layers: int) -> CausalLMConfig:
    base = _llama(
        *(embed_dim, num_heads, 8, mlp_dim, num_layers),
        vocab_size=151_936,
        max_positions=40_960,
        rope_theta=1_000_000.0,
        eos=151_645,
        head_dim=128,
    )
    return replace(base, model_type="qwen3", norm_eps=1e-6, qk_norm="head")


def _gemma(
    model_type: str,
    embed_dim: int,
    num_heads: int,
    num_kv_heads: int,
    mlp_dim: int,
    windows: tuple[int, ...],
    *,
    vocab_size: int,
    max_positions: int,
) -> CausalLMConfig:
    base = _llama(
        *(embed_dim, num_heads, num_kv_heads, mlp_dim, len(windows)),
        vocab_size=vocab_size,
        max_positions=max_positions,
        rope_theta=10_000.0,
        eos=1,
        head_dim=256,
    )
    return replace(
        base,
        model_type=model_type,
        norm="rms_plus_one",
        norm_eps=1e-6,
        post_norms=True,
        mlp_activations=("gelu", "linear"),
        embedding_scale=embed_dim**0.5,
        windows=windows,
        token_ids=TokenIds(pad=0, eos=1, start=-1),
    )


def _gemma_3(
    embed_dim: int, num_heads: int, num_kv_heads: int, mlp_dim: int, layers: int
) -> CausalLMConfig:
    windows = tuple(0 if (i + 1) % 6 == 0 else 512 for i in range(layers))
    base = _gemma(
        *("gemma3_text", embed_dim, num_heads, num_kv_heads, mlp_dim, windows),
        vocab_size=262_144,
        max_positions=32_768,
    )
    return replace(base, rope_theta=1_000_000.0, rope_local_theta=10_000.0, qk_norm="head")


def _gpt2(embed_dim: int, num_heads: int, num_layers: int) -> CausalLMConfig:
    head_dim = embed_dim // num_heads
    return CausalLMConfig(
        model_type="gpt2",
        vocab_size=50_257,
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        mlp_dim=4 * embed_dim,
        num_layers=num_layers,
        max_positions=1024,
        mlp_activations=("gelu",),
        norm="layer",
        norm_eps=1e-5,
        positions="learned",
        query_scale=head_dim**-0.5,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tie_embeddings=True,
        token_ids=TokenIds(pad=50_256, eos=50_256, start=-1),
    )


def _bloom(embed_dim: int, num_layers: int) -> CausalLMConfig:
    base = replace(_gpt2(embed_dim, 16, num_layers), model_type="bloom", vocab_size=250_880)
    return replace(
        base,
        max_positions=2048,
        positions="alibi",
        embedding_norm=True,
        token_ids=TokenIds(pad=3, eos=2, start=-1),
    )


PRESETS: dict[str, CausalLMConfig] = {
    "HuggingFaceTB/SmolLM2-135M": _smollm2(576, 9, 3, 1536, 30),
    "HuggingFaceTB/SmolLM2-360M": _smollm2(960, 15, 5, 2560, 32),
    "HuggingFaceTB/SmolLM2-1.7B": replace(_smollm2(2048, 32, 32, 8192, 24), rope_theta=130_000.0),
    "meta-llama/Llama-3.2-1B": _llama_3(2048, 32, 8192, 16, rope_factor=32.0),
    "meta-llama/Llama-3.2-3B": _llama_3(3072, 24, 8192, 28, rope_factor=32.0),
    "meta-llama/Llama-3.1-8B": _llama_3(
        4096, 32, 14_336, 32, rope_factor=8.0, tie_embeddings=False
    ),
    "mistralai/Mistral-7B-v0.1": replace(
        _llama(
            *(4096, 32, 8, 14_336, 32),
            vocab_size=32_000,
            max_positions=32_768,
            rope_theta=10_000.0,
            eos=2,
            tie_embeddings=False,
        ),
        model_type="mistral",
        windows=(4096,) * 32,
    ),
    "Qwen/Qwen2.5-0.5B": _qwen_2_5(896, 14, 4864, 24),
    "Qwen/Qwen2.5-1.5B": _qwen_2_5(1536, 12, 8960, 28),
    "Qwen/Qwen3-0.6B": _qwen_3(1024, 16, 3072, 28),
    "Qwen/Qwen3-1.7B": _qwen_3(2048, 16, 6144, 28),
    "google/gemma-2-2b": replace(
        _gemma(
            *("gemma2", 2304, 8, 4, 9216, (4096, 0) * 13),
            vocab_size=256_000,
            max_positions=8192,
        ),
        attention_softcap=50.0,
        logits_softcap=30.0,
    ),
    "google/gemma-3-270m": _gemma_3(640, 4, 1, 2048, 18),
    "google/gemma-3-1b-pt": _gemma_3(1152, 4, 1, 6912, 26),
    "openai-community/gpt2": _gpt2(768, 12, 12),
    "openai-community/gpt2-medium": _gpt2(1024, 16, 24),
    "openai-community/gpt2-large": _gpt2(1280, 20, 36),
    "openai-community/gpt2-xl": _gpt2(1600, 25, 48),
    "bigscience/bloomz-560m": _bloom(1024, 24),
    "bigscience/bloomz-1b1": _bloom(1536, 24),
}
