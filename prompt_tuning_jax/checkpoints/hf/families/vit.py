"""Vision transformers: what their ``config.json`` says, and the names of their tensors.

Defaults are those of transformers' configuration_vit.py (4.57 and 5.24 agree).
"""

from prompt_tuning_jax.checkpoints.hf.config_fields import ConfigFields
from prompt_tuning_jax.checkpoints.hf.families.base import head_width
from prompt_tuning_jax.models.vit.config import ViTConfig

ARCHITECTURE, WITHOUT_CLASSIFIER = "ViTForImageClassification", "ViTModel"
PREFIX = "vit."  # of all tensors but the classifier's; files of a ViTModel have none
# A layer on the class token that only ViTModel has, and classification does not use.
UNUSED = r"(vit\.)?pooler\..*"

_LAYER = {
    "pre_attention_layer_norm": "layernorm_before",
    "attention/query": "attention.attention.query",
    "attention/key": "attention.attention.key",
    "attention/value": "attention.attention.value",
    "attention/out": "attention.output.dense",
    "pre_mlp_layer_norm": "layernorm_after",
    "mlp/wi": "intermediate.dense",
    "mlp/wo": "output.dense",
}
_PATCHES = "embeddings.patch_embeddings.projection"


def describe_vit(c: ConfigFields) -> None:
    """The sizes of a vision transformer; its labels are read and written apart."""
    c.size("embed_dim", "hidden_size", 768)
    c.size("num_layers", "num_hidden_layers", 12)
    c.size("num_heads", "num_attention_heads", 12)
    c.size("mlp_dim", "intermediate_size", 3072)
    c.size("image_size", "image_size", 224)
    c.size("patch_size", "patch_size", 16)
    c.size("num_channels", "num_channels", 3)
    c.activation("hidden_act", "gelu", gated=False)
    c.number("norm_eps", "layer_norm_eps", 1e-12)
    c.flag("qkv_bias", "qkv_bias", True)
    c.fixed(head_dim=head_width)


def tensor_shapes(config: ViTConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns the name and shape of each parameter's tensor, by our name.

    Kernels are ``[out, in]``.
    """
    d, f = config.embed_dim, config.mlp_dim
    channels, patch = config.num_channels, config.patch_size
    prefix = PREFIX if config.labels else ""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        "cls_token": (f"{prefix}embeddings.cls_token", (1, 1, d)),
        "position_embedding": (
            f"{prefix}embeddings.position_embeddings",
            (1, 1 + config.num_patches, d),
        ),
        "patch_embedder/kernel": (f"{prefix}{_PATCHES}.weight", (d, channels, patch, patch)),
        "patch_embedder/bias": (f"{prefix}{_PATCHES}.bias", (d,)),
        "encoder/encoder_norm/scale": (f"{prefix}layernorm.weight", (d,)),
        "encoder/encoder_norm/bias": (f"{prefix}layernorm.bias", (d,)),
    }
    shapes = {"mlp/wi": (f, d), "mlp/wo": (d, f)}
    for i in range(config.num_layers):
        for ours, theirs in _LAYER.items():
            module, tensor = f"encoder/layers_{i}/{ours}", f"{prefix}encoder.layer.{i}.{theirs}"
            is_norm = ours.endswith("norm")
            shape = (d,) if is_norm else shapes.get(ours, (d, d))
            tensors[f"{module}/{'scale' if is_norm else 'kernel'}"] = (f"{tensor}.weight", shape)
            if config.qkv_bias or not theirs.startswith("attention.attention"):
                tensors[f"{module}/bias"] = (f"{tensor}.bias", shape[:1])
    if config.labels:
        tensors["classifier/kernel"] = ("classifier.weight", (len(config.labels), d))
        tensors["classifier/bias"] = ("classifier.bias", (len(config.labels),))
    return tensors
