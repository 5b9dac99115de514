"""The parameters of models built from the decoder-only stack: their names and shapes."""

from prompt_tuning_jax.models.causal_lm.config import CausalLMConfig
from prompt_tuning_jax.models.t5gemma.config import T5GemmaConfig

EMBEDDING = "token_embedder/embedding"
DECODER_EMBEDDING = "decoder_embedder/embedding"  # of a T5Gemma
HEAD = "decoder/logits_dense"


def causal_parameter_shapes(config: CausalLMConfig) -> dict[str, tuple[int, ...]]:
    """Returns every frozen parameter of such a model, and its shape; kernels are ``[in, out]``."""
    d = config.embed_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, d)}
    if config.positions == "learned":
        rows = config.max_positions + config.position_offset
        shapes["position_embedder/embedding"] = (rows, d)
    if config.embedding_norm:
        shapes |= {"embedding_norm/scale": (d,), "embedding_norm/bias": (d,)}
    return shapes | _stack_shapes(config, "decoder")


def t5gemma_parameter_shapes(config: T5GemmaConfig) -> dict[str, tuple[int, ...]]:
    """Returns every frozen parameter of a T5Gemma, and its shape; kernels are ``[in, out]``."""
    encoder, decoder = config.encoder, config.decoder
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (encoder.vocab_size, encoder.embed_dim)}
    if not config.shares_table:
        shapes[DECODER_EMBEDDING] = (decoder.vocab_size, decoder.embed_dim)
    if config.eoi >= 0:
        shapes["eoi_embedding"] = (encoder.embed_dim,)
        if not config.shares_table:
            shapes["decoder_eoi_embedding"] = (decoder.embed_dim,)
    cross = None if config.merged else encoder.embed_dim
    return shapes | _stack_shapes(encoder, "encoder") | _stack_shapes(decoder, "decoder", cross)


def _stack_shapes(
    config: CausalLMConfig, stack: str, cross_features: int | None = None
) -> dict[str, tuple[int, ...]]:
    """Returns the parameters of a stack, with those of its final norm and its output head."""
    d, f, k = config.embed_dim, config.mlp_dim, config.head_dim
    heads, kv_heads = config.num_heads * k, config.num_kv_heads * k
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(path: str, width: int = d) -> None:
        if config.norm != "layer_without_weights":
            shapes[f"{path}/scale"] = (width,)
        if config.norm == "layer":
            shapes[f"{path}/bias"] = (width,)

    def linear(path: str, width: int, out: int, *, bias: bool) -> None:
        shapes[f"{path}/kernel"] = (width, out)
        if bias:
            shapes[f"{path}/bias"] = (out,)

    def attention(path: str, source: int) -> None:
        linear(f"{path}/query", d, heads, bias=config.qkv_bias)
        linear(f"{path}/key", source, kv_heads, bias=config.qkv_bias)
        linear(f"{path}/value", source, kv_heads, bias=config.qkv_bias)
        linear(f"{path}/out", heads, d, bias=config.out_bias)
        if config.qk_norm != "none":
            whole = config.qk_norm == "all"
            shapes[f"{path}/query_norm/scale"] = (heads if whole else k,)
            shapes[f"{path}/key_norm/scale"] = (kv_heads if whole else k,)

    for i in range(config.num_layers):
        layer = f"{stack}/layers_{i}"
        sublayers = [("self_attention", "self_attention", d)]
        if cross_features is not None:
            sublayers.append(("cross_attention", "encoder_decoder_attention", cross_features))
        for name, module, source in sublayers:
            if config.pre_norms:
                norm(f"{layer}/pre_{name}_layer_norm")
            attention(f"{layer}/{module}", source)
            if config.post_norms:
                norm(f"{layer}/post_{name}_layer_norm")
        if config.pre_norms and not config.shared_norm:
            norm(f"{layer}/pre_mlp_layer_norm")
        inputs = ("wi",) if len(config.mlp_activations) == 1 else ("wi_0", "wi_1")
        for name in inputs:
            linear(f"{layer}/mlp/{name}", d, f, bias=config.mlp_bias)
        linear(f"{layer}/mlp/wo", f, d, bias=config.mlp_bias)
        if config.post_norms:
            norm(f"{layer}/post_mlp_layer_norm")
    if config.final_norm:
        norm(f"{stack}/{stack}_norm")
    if stack == "decoder" and not config.tie_embeddings:
        linear(HEAD, d, config.vocab_size, bias=config.logits_bias)
    return shapes
