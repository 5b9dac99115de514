"""Chooses how the attention of a stack is computed on a platform, and says why."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.ops import cudnn_attention as cudnn
from prompt_tuning_jax.models.ops import fused_tiles

Asked: TypeAlias = Literal["auto", "xla", "fused"]
Implementation: TypeAlias = Literal["xla", "pallas", "cudnn"]

# Platforms on which the kernel has run; ``auto`` takes it there.
PROVEN: frozenset[str] = frozenset()

_NAMES = {
    "xla": "products and softmax apart",
    "pallas": "one Pallas kernel",
    "cudnn": "one cuDNN kernel",
}


@dataclass(frozen=True, kw_only=True)
class AttentionTraits:
    """What of the stack that reads the input decides how its attention can be computed.

    Attributes:
      name: of the stack.
      head_dim: the width K of a head.
      dtype: of the products.
      causal: whether each position sees those before it alone.
      bias: what is added to scores: a learned value for each head and distance (T5), or a multiple
        of the distance (ALiBi).
      softcap: the cap of scores, or 0.
      whole: whether the family can compute it in one kernel.
    """

    name: str
    head_dim: int
    dtype: str
    causal: bool = True
    bias: Literal["none", "distance", "alibi"] = "none"
    softcap: float = 0.0
    whole: bool = True


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What an experiment does with the attention.

    Attributes:
      platform: ``cpu``, ``gpu`` or ``tpu``.
      queries: the most positions of a row that attend.
      keys: the most positions that they attend to, prompt included.
      trains_weights: whether a bias needs a gradient.
      dropout: whether attention weights are dropped.
      compute_capability: of a GPU.
    """

    platform: str
    queries: int
    keys: int
    trains_weights: bool = False
    dropout: bool = False
    compute_capability: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How attention is computed, and why."""

    implementation: Implementation
    reason: str

    def __str__(self) -> str:
        return f"{self.implementation} ({_NAMES[self.implementation]}): {self.reason}"


PLAIN = Choice(implementation="xla", reason="nothing else was asked for")


def choose_attention(name: Asked, traits: AttentionTraits, usage: Usage) -> Choice:
    """Chooses an implementation; raises UserError if ``fused`` is asked for and cannot be had."""
    platform = usage.platform.upper()
    if name == "xla":
        return Choice(implementation="xla", reason="model.attention=xla")
    obstacle = _obstacle(traits, usage)
    if obstacle:
        if name == "fused":
            raise UserError(f"model.attention=fused: {obstacle}; set model.attention=auto")
        return Choice(implementation="xla", reason=obstacle)
    kernel: Implementation = "pallas" if usage.platform == "tpu" else "cudnn"
    if name == "fused":
        return Choice(implementation=kernel, reason="model.attention=fused")
    if usage.platform in PROVEN:
        return Choice(implementation=kernel, reason=f"the {traits.name} meets its rules")
    reason = (
        f"the kernel of this library has not run on a {platform} yet; model.attention=fused uses it"
    )
    return Choice(implementation="xla", reason=reason)


def _obstacle(traits: AttentionTraits, usage: Usage) -> str:
    """Returns why there is no kernel for this attention; empty if there is one."""
    stack = traits.name
    if usage.platform not in ("tpu", "gpu"):
        return f"there is a kernel for TPUs and GPUs, and this run uses {usage.platform}"
    if not traits.whole:
        return f"there is no kernel for the {stack} of this family"
    if traits.bias == "alibi":
        return f"the {stack} has ALiBi, which no kernel here computes"
    return _tpu_obstacle(traits, usage) if usage.platform == "tpu" else _gpu_obstacle(traits, usage)


def _tpu_obstacle(traits: AttentionTraits, usage: Usage) -> str:
    stack, biased = traits.name, traits.bias == "distance"
    if biased and usage.trains_weights:
        return f"the kernel is for frozen weights, and the method trains the bias of the {stack}"
    if usage.queries < fused_tiles.FEWEST_QUERIES:
        return (
            f"the kernel is for {fused_tiles.FEWEST_QUERIES} positions or more, and the {stack} "
            f"reads at most {usage.queries}"
        )
    most = fused_tiles.most_keys(
        width=traits.head_dim, dtype=traits.dtype, maps=biased or usage.dropout
    )
    if usage.keys > most:
        dropout = " and dropout" if usage.dropout and not biased else ""
        return (
            f"the kernel is for up to {most:,} positions with heads of {traits.head_dim} in "
            f"{traits.dtype}{dropout}, and the {stack} reads up to {usage.keys:,}"
        )
    return ""


def _gpu_obstacle(traits: AttentionTraits, usage: Usage) -> str:
    stack, width = traits.name, traits.head_dim
    newer = usage.compute_capability >= cudnn.HOPPER
    widest = cudnn.WIDEST_FROM_HOPPER if newer else cudnn.WIDEST
    if traits.bias == "distance":
        return f"cuDNN computes a gradient as large as the scores for the bias that the {stack} has"
    if not traits.causal:
        return f"the kernel is for causal attention, and the {stack} sees both directions"
    if traits.softcap:
        return f"cuDNN has no softcap on scores, and the {stack} has one"
    if traits.dtype not in ("bfloat16", "float16"):
        return f"cuDNN needs bfloat16, and model.dtype is {traits.dtype}"
    if width % cudnn.MULTIPLE or width > widest:
        return (
            f"cuDNN needs heads of a multiple of {cudnn.MULTIPLE} up to {widest} numbers, and the "
            f"{stack} has {width}"
        )
    if usage.dropout:
        return "cuDNN has no dropout that all heads share; model.dropout_rate=0 has none"
    return ""
