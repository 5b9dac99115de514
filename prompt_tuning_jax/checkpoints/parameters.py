"""The parameters of a model: their shapes and, of a T5, the configuration that they imply."""

import re
from collections.abc import Mapping
from typing import Any

from prompt_tuning_jax.checkpoints.causal_parameters import (
    causal_parameter_shapes,
    t5gemma_parameter_shapes,
)
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.causal_lm.config import CausalLMConfig
from prompt_tuning_jax.models.config import ModelConfig
from prompt_tuning_jax.models.t5.config import T5Config
from prompt_tuning_jax.models.t5gemma.config import T5GemmaConfig

EMBEDDING = "token_embedder/embedding"
LOGITS = "decoder/logits_dense/kernel"
# In each stack, or with ``relpos_per_layer`` in each of its layers.
RELPOS = "relpos_bias/rel_embedding"


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns every frozen parameter of a model with this configuration, and its shape."""
    if isinstance(config, T5Config):
        return _t5_shapes(config)
    if isinstance(config, CausalLMConfig):
        return causal_parameter_shapes(config)
    if isinstance(config, T5GemmaConfig):
        return t5gemma_parameter_shapes(config)
    from flax import nnx

    from prompt_tuning_jax import param_tree
    from prompt_tuning_jax.models.base import model_class

    model = nnx.eval_shape(lambda: model_class(config)(config, rngs=nnx.Rngs(0)))
    return {name: tuple(array.shape) for name, array in param_tree.split(model)[1].items()}


def _t5_shapes(config: T5Config) -> dict[str, tuple[int, ...]]:
    """Returns the parameters of a T5 (t5x/examples/t5/network.py), without building one."""
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


def require_t5(config: ModelConfig, *, what: str) -> T5Config:
    """Returns the configuration if it is a T5's; raises UserError, naming ``what``, if not."""
    if not isinstance(config, T5Config):
        raise UserError(f"{what} is supported only for T5, and this model is not one")
    return config


def require_parameters(params: Mapping[str, Any], config: ModelConfig, *, of: str) -> None:
    """Raises UserError unless ``params`` are exactly the parameters of such a model.

    ``of`` says where they come from; parameters may be any objects with a shape.
    """
    import jax

    from prompt_tuning_jax.param_tree import require_same_shapes

    wanted = {
        name: jax.ShapeDtypeStruct(shape, "float32")
        for name, shape in parameter_shapes(config).items()
    }
    kind = getattr(config, "model_type", "T5")
    require_same_shapes(params, wanted, of=of, and_of=f"a {kind} of this configuration")


# The path of the prompt [P,D] among the model's parameters in the original prompt tuning code.
PROMPT = "encoder/prompt/prompt/prompt"
# Parts of paths that only prompts have.
_OF_PROMPTS = re.compile(r"(^|.*/)\w*prompt\w*(/.*|$)", re.DOTALL)
# What the original's methods train; layers may be stacked (encoder/encoder).
_OF_METHODS = re.compile(
    r"encoder/prompt/prompt/(prompt|shared_prompt|task_prompts/embedding)"
    r"|encoder/(layers_\d+|encoder)/prompt/prompt/prompt"
    r"|(encoder|decoder)/.+/([qkv]_conv|intermediate_conv)/ia3_scaling"
)
_RELPOS_OF_STACK = (f"encoder/{RELPOS}", f"decoder/{RELPOS}")
_RELPOS_OF_LAYER = re.compile(rf"(encoder|decoder)/layers_\d+/{RELPOS}")


def is_prompt(name: str) -> bool:
    """Returns whether a parameter belongs to a prompt, in the encoder's input or elsewhere."""
    return _OF_PROMPTS.fullmatch(name) is not None


def is_trained(name: str) -> bool:
    """Returns whether a parameter belongs to a method of the original code."""
    return _OF_METHODS.fullmatch(name) is not None


def config_of(params: Mapping[str, Any], *, relpos_max_distance: int | None = None) -> T5Config:
    """Returns the configuration of the T5 with the parameters ``params``.

    These are by name, and only their shapes matter.

    Shapes do not tell ``relpos_max_distance``: the default is T5's 128 for 32 buckets, and
    otherwise twice their number.  Nor do they tell activations, which are T5 1.1's for a gated mlp
    and T5 1.0's otherwise.  Prompts and IA3's scales are allowed.  Raises UserError if these are
    not exactly the parameters of one T5.
    """
    of = "the checkpoint"
    of_layer = next((name for name in params if _RELPOS_OF_LAYER.fullmatch(name)), None)
    of_stack = next((name for name in params if name in _RELPOS_OF_STACK), None)
    if of_layer is not None and of_stack is not None:
        raise UserError(
            f"{of} has {of_layer} and {of_stack}: there is one relative position bias per layer or "
            "one per stack, not both"
        )
    vocab_size, embed_dim = _shape(params, EMBEDDING)
    for stack in ("decoder", "encoder"):
        layer = "" if of_layer is None else "layers_0/"
        num_heads, num_buckets = _shape(params, f"{stack}/{layer}{RELPOS}")
    _, all_heads = _shape(params, "encoder/layers_0/attention/query/kernel")
    if not num_heads or all_heads % num_heads:
        raise UserError(f"{of} has query kernels of width {all_heads} for {num_heads} heads")
    gated = "encoder/layers_0/mlp/wi_0/kernel" in params
    _, mlp_dim = _shape(params, f"encoder/layers_0/mlp/{'wi_0' if gated else 'wi'}/kernel")
    config = T5Config(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_heads=num_heads,
        head_dim=all_heads // num_heads,
        mlp_dim=mlp_dim,
        num_encoder_layers=_count_layers(params, "encoder"),
        num_decoder_layers=_count_layers(params, "decoder"),
        mlp_activations=("gelu", "linear") if gated else ("relu",),
        tie_embeddings=LOGITS not in params,
        relpos_num_buckets=num_buckets,
        relpos_max_distance=relpos_max_distance or (128 if num_buckets == 32 else 2 * num_buckets),
        relpos_per_layer=of_layer is not None,
    )
    require_parameters({k: v for k, v in params.items() if not is_trained(k)}, config, of=of)
    return config


def _count_layers(params: Mapping[str, Any], stack: str) -> int:
    matches = (re.match(rf"{stack}/layers_(\d+)/", name) for name in params)
    return len({match[1] for match in matches if match})


def _shape(params: Mapping[str, Any], name: str) -> tuple[int, int]:
    if name not in params:
        raise UserError(f"the checkpoint has no {name}: it is not a T5 with a layer per name")
    shape = tuple(params[name].shape)
    if len(shape) != 2:
        raise UserError(
            f"{name} has shape {list(shape)} in the checkpoint; a T5 has two dimensions there"
        )
    return shape[0], shape[1]
