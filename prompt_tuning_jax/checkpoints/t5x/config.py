"""Which T5 the parameters of a checkpoint belong to, by their shapes."""

import re
from collections.abc import Mapping
from typing import Any

from prompt_tuning_jax.checkpoints.names import (
    EMBEDDING,
    LOGITS,
    RELPOS,
    require_parameters,
)
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.t5.config import T5Config

# Where the original prompt tuning code keeps its prompt [P,D] among the model's parameters.
PROMPT = "encoder/prompt/prompt/prompt"
# What no other parameter's path has among its parts.
_OF_PROMPTS = re.compile(r"(^|.*/)\w*prompt\w*(/.*|$)", re.DOTALL)
_SHARED_RELPOS = (f"encoder/{RELPOS}", f"decoder/{RELPOS}")
_OWN_RELPOS = re.compile(rf"(encoder|decoder)/layers_\d+/{RELPOS}")


def is_prompt(name: str) -> bool:
    """Whether a parameter belongs to a prompt, of the encoder's input or of anything else."""
    return _OF_PROMPTS.fullmatch(name) is not None


def config_of(
    params: Mapping[str, Any],
    *,
    relpos_max_distance: int = 128,
    mlp_activations: tuple[str, ...] | None = None,
) -> T5Config:
    """The configuration of the T5 that ``params`` (by name; only shapes matter) belong to.

    What shapes cannot tell is an argument.  ``mlp_activations`` is T5 1.1's for a gated mlp and T5
    1.0's otherwise.  A prompt at ``PROMPT`` is allowed.  Raises UserError if these are not exactly
    the parameters of one T5.
    """
    of = "the checkpoint"
    own = next((name for name in params if _OWN_RELPOS.fullmatch(name)), None)
    shared = next((name for name in params if name in _SHARED_RELPOS), None)
    if own is not None and shared is not None:
        raise UserError(
            f"{of} has {own} and {shared}: relative position biases are one per layer or one per "
            "stack, not both"
        )
    vocab_size, embed_dim = _shape(params, EMBEDDING)
    for stack in ("decoder", "encoder"):
        of_layer = "" if own is None else "layers_0/"
        num_heads, num_buckets = _shape(params, f"{stack}/{of_layer}{RELPOS}")
    _, all_heads = _shape(params, "encoder/layers_0/attention/query/kernel")
    if not num_heads or all_heads % num_heads:
        raise UserError(f"{of} has query kernels of width {all_heads} for {num_heads} heads")
    gated = "encoder/layers_0/mlp/wi_0/kernel" in params
    if mlp_activations is None:
        mlp_activations = ("gelu", "linear") if gated else ("relu",)
    _, mlp_dim = _shape(params, f"encoder/layers_0/mlp/{'wi_0' if gated else 'wi'}/kernel")
    config = T5Config(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_heads=num_heads,
        head_dim=all_heads // num_heads,
        mlp_dim=mlp_dim,
        num_encoder_layers=_count_layers(params, "encoder"),
        num_decoder_layers=_count_layers(params, "decoder"),
        mlp_activations=mlp_activations,
        tie_embeddings=LOGITS not in params,
        relpos_num_buckets=num_buckets,
        relpos_max_distance=relpos_max_distance,
        relpos_per_layer=own is not None,
    )
    require_parameters({k: v for k, v in params.items() if k != PROMPT}, config, of=of)
    return config


def _count_layers(params: Mapping[str, Any], stack: str) -> int:
    found = (re.match(rf"{stack}/layers_(\d+)/", name) for name in params)
    return len({match[1] for match in found if match})


def _shape(params: Mapping[str, Any], name: str) -> tuple[int, int]:
    if name not in params:
        raise UserError(f"the checkpoint has no {name}: it is not a T5 with a layer per name")
    shape = tuple(params[name].shape)
    if len(shape) != 2:
        raise UserError(f"{name} has shape {list(shape)} in the checkpoint; it has two in a T5")
    return shape[0], shape[1]
