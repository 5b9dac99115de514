"""The parameters of a decoder-only model: their names and shapes."""

from prompt_tuning_jax.models.causal_lm.config import CausalLMConfig

EMBEDDING = "token_embedder/embedding"
HEAD = "decoder/logits_dense"


def causal_parameter_shapes(config: CausalLMConfig) -> dict[str, tuple[int, ...]]:
    """Every frozen parameter of such a model, and its shape; kernels are ``[in, out]``."""
    d, f, k = config.embed_dim, config.mlp_dim, config.head_dim
    heads, kv_heads = config.num_heads * k, config.num_kv_heads * k
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(path: str, width: int = d, *, layer: bool = config.norm == "layer") -> None:
        if config.norm != "layer_without_weights" or layer:
            shapes[f"{path}/scale"] = (width,)
        if layer:
            shapes[f"{path}/bias"] = (width,)

    def linear(path: str, width: int, out: int, *, bias: bool) -> None:
        shapes[f"{path}/kernel"] = (width, out)
        if bias:
            shapes[f"{path}/bias"] = (out,)

    shapes[EMBEDDING] = (config.vocab_size, d)
    if config.positions == "learned":
        rows = config.max_positions + config.position_offset
        shapes["position_embedder/embedding"] = (rows, d)
    if config.embedding_norm:
        norm("embedding_norm", layer=True)
    for i in range(config.num_layers):
        layer = f"decoder/layers_{i}"
        attention, mlp = f"{layer}/self_attention", f"{layer}/mlp"
        if config.pre_norms:
            norm(f"{layer}/pre_self_attention_layer_norm")
        linear(f"{attention}/query", d, heads, bias=config.qkv_bias)
        linear(f"{attention}/key", d, kv_heads, bias=config.qkv_bias)
        linear(f"{attention}/value", d, kv_heads, bias=config.qkv_bias)
        linear(f"{attention}/out", heads, d, bias=config.out_bias)
        if config.qk_norm != "none":
            whole = config.qk_norm == "all"
            shapes[f"{attention}/query_norm/scale"] = (heads if whole else k,)
            shapes[f"{attention}/key_norm/scale"] = (kv_heads if whole else k,)
        if config.post_norms:
            norm(f"{layer}/post_self_attention_layer_norm")
        if config.pre_norms and not config.shared_norm:
            norm(f"{layer}/pre_mlp_layer_norm")
        inputs = ("wi",) if len(config.mlp_activations) == 1 else ("wi_0", "wi_1")
        for name in inputs:
            linear(f"{mlp}/{name}", d, f, bias=config.mlp_bias)
        linear(f"{mlp}/wo", f, d, bias=config.mlp_bias)
        if config.post_norms:
            norm(f"{layer}/post_mlp_layer_norm")
    if config.final_norm:
        norm("decoder/decoder_norm")
    if not config.tie_embeddings:
        linear(HEAD, d, config.vocab_size, bias=config.logits_bias)
    return shapes
