"""Which parameters a T5 has, by T5X's names, and their shapes."""

from collections.abc import Mapping
from typing import Any

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.t5.config import T5Config

EMBEDDING = "token_embedder/embedding"
LOGITS = "decoder/logits_dense/kernel"
# Of a stack, or with ``relpos_per_layer`` of each of its layers.
RELPOS = "relpos_bias/rel_embedding"


def parameter_shapes(config: T5Config) -> dict[str, tuple[int, ...]]:
    """Every frozen parameter of the model and its shape (t5x/examples/t5/network.py)."""
    d, f = config.embed_dim, config.mlp_dim
    heads = config.num_heads * config.head_dim
    attention = {"query": (d, heads), "key": (d, heads), "value": (d, heads), "out": (heads, d)}
    wi = ("wi",) if len(config.mlp_activations) == 1 else ("wi_0", "wi_1")
    mlp = {**{name: (d, f) for name in wi}, "wo": (f, d)}
    relpos = (config.num_heads, config.relpos_num_buckets)

    def kernels(path: str, of: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
        return {f"{path}/{name}/kernel": shape for name, shape in of.items()}

    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, d)}
    if not config.relpos_per_layer:
        shapes |= {f"{stack}/{RELPOS}": relpos for stack in ("encoder", "decoder")}
    shapes |= {"encoder/encoder_norm/scale": (d,), "decoder/decoder_norm/scale": (d,)}
    for i in range(config.num_encoder_layers):
        layer = f"encoder/layers_{i}"
        if config.relpos_per_layer:
            shapes[f"{layer}/{RELPOS}"] = relpos
        for norm in ("attention", "mlp"):
            shapes[f"{layer}/pre_{norm}_layer_norm/scale"] = (d,)
        shapes |= kernels(f"{layer}/attention", attention) | kernels(f"{layer}/mlp", mlp)
    for i in range(config.num_decoder_layers):
        layer = f"decoder/layers_{i}"
        if config.relpos_per_layer:
            shapes[f"{layer}/{RELPOS}"] = relpos
        for norm in ("self_attention", "cross_attention", "mlp"):
            shapes[f"{layer}/pre_{norm}_layer_norm/scale"] = (d,)
        for block in ("self_attention", "encoder_decoder_attention"):
            shapes |= kernels(f"{layer}/{block}", attention)
        shapes |= kernels(f"{layer}/mlp", mlp)
    if not config.tie_embeddings:
        shapes[LOGITS] = (d, config.vocab_size)
    return shapes


def require_parameters(params: Mapping[str, Any], config: T5Config, *, of: str) -> None:
    """Raises UserError unless ``params`` are the parameters of such a model, all and no others.

    ``of`` says where they come from; anything with a shape will do as a parameter.
    """
    import jax

    from prompt_tuning_jax.models.quantization import is_quantized
    from prompt_tuning_jax.param_tree import require_same_shapes

    if is_quantized(params):
        raise UserError(f"{of} are quantised; only full weights are written, load them without")
    wanted = {
        name: jax.ShapeDtypeStruct(shape, "float32")
        for name, shape in parameter_shapes(config).items()
    }
    require_same_shapes(params, wanted, of=of, and_of="a T5 of this configuration")
