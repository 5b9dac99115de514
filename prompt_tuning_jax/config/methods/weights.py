"""Configs of the methods that change the weights of the model, or add to its layers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from prompt_tuning_jax.config.field_syntax import first_match, parse_numbers
from prompt_tuning_jax.config.methods.base import (
    CLASSIFIER,
    MethodConfig,
    alpha_errors,
    dropout_errors,
    is_attached,
    is_selected,
    pattern_errors,
)
from prompt_tuning_jax.errors import UserError

_MAX_RANK = 2**20  # larger than the width of any model


@dataclass(frozen=True, kw_only=True)
class LoRA(MethodConfig):
    """``rank * (in + out)`` parameters per target: ``.../adapter/lora_a_DR`` and ``lora_b_RF``.

    With the defaults, on a T5: ``2 * rank * (D + H * K) * (encoder layers + 2 * decoder layers)``.

    DoRA (``dora``) adds ``out`` per target, ``lora_magnitude_F``.  ``embeddings`` add ``rank * (V +
    D)`` each, ``copies`` ``V * D`` each, and ``parameters`` the sizes of the arrays that they
    match.  Frozen weights may be quantized.
    """

    implementation = "prompt_tuning_jax.methods.lora:LoRAModule"
    for_images = True
    identity_at_init = True
    mergeable = True
    default_optimizer: ClassVar[Mapping[str, Any]] = {"learning_rate": 0.01, "weight_decay": 0.0}
    lower_bounds: ClassVar[Mapping[str, float]] = {"rank": 1}
    training_only: ClassVar[Mapping[str, Any]] = {"dropout": 0.0}

    rank: int = 8  # rank of the updates
    alpha: float = 16.0  # updates are scaled by ``alpha / rank``
    # Other ranks and alphas of some maps, as ``REGEX=NUMBER``; the first expression that matches a
    # whole path decides.
    ranks: tuple[str, ...] = ()
    alphas: tuple[str, ...] = ()  # likewise
    # Scale by ``alpha / sqrt(rank)`` instead (Kalajdzievski 2023).
    rank_stabilized: bool = False
    dropout: float = 0.0  # dropout on the input of the updates
    # Train the norm of each output's weights apart from their direction, which the update changes
    # (DoRA, Liu et al. 2024).
    dora: bool = False
    # Linear maps to update: RE2 expressions that match a whole path, such as
    # ``encoder/layers_0/attention/query``.
    targets: tuple[str, ...] = (".*/(query|value)",)
    # Uses of the embedding table to update, each by itself, likewise: ``encoder/embed_tokens`` (if
    # there is an encoder), ``decoder/embed_tokens``, and ``decoder/tied_logits`` if the table is
    # also the output head.
    embeddings: tuple[str, ...] = ()
    # Uses of the embedding table that get a table of their own, which is trained, likewise.
    copies: tuple[str, ...] = ()
    # Parameters of the model to train too: RE2 expressions that match a whole path, such as
    # ``.*/bias`` or ``decoder/logits_dense/kernel``.
    parameters: tuple[str, ...] = ()

    def rank_of(self, path: str) -> int:
        """Returns the rank of the update of one map."""
        return int(first_match(parse_numbers(self.ranks, field="method.ranks"), path, self.rank))

    def scale_of(self, path: str) -> float:
        """Returns the factor on the product of one map's matrices."""
        alpha = first_match(parse_numbers(self.alphas, field="method.alphas"), path, self.alpha)
        rank = self.rank_of(path)
        return alpha / (rank**0.5 if self.rank_stabilized else rank)

    def uses_rng(self) -> bool:
        return self.dropout > 0

    def trains(self, name: str) -> bool:
        return is_attached(name) or is_selected(name, self.parameters, of="method.parameters")

    def config_errors(self) -> Iterator[str]:
        yield from super().config_errors()
        try:
            ranks = [rank for _, rank in parse_numbers(self.ranks, field="method.ranks")]
            alphas = [alpha for _, alpha in parse_numbers(self.alphas, field="method.alphas")]
        except UserError as error:
            yield str(error)
            return
        for rank in ranks:
            if rank != int(rank) or not 1 <= rank <= _MAX_RANK:
                yield f"method.ranks has {rank:g}; must be a whole number from 1 to {_MAX_RANK}"
        for name, alpha in (("alpha", self.alpha), *(("alphas", alpha) for alpha in alphas)):
            yield from alpha_errors(alpha, field=name)
        yield from dropout_errors(self.dropout)
        if not self.targets and not self.embeddings:
            yield "method.targets is empty; give at least one regular expression"
        for name in ("targets", "embeddings", "copies", "parameters"):
            yield from pattern_errors(getattr(self, name), field=f"method.{name}")


@dataclass(frozen=True, kw_only=True)
class IA3(MethodConfig):
    """One parameter for each output of ``outputs`` and for each input of ``inputs``.

    With the defaults, on a T5: ``2 * H * K * (encoder layers + 2 * decoder layers)`` on keys and
    values, and ``F * (encoder layers + decoder layers)`` on the input of the MLP's ``wo``.  They
    are called ``.../adapter/scale_F`` and ``.../adapter/scale_D``, and are initialized to ones.
    Frozen weights may be quantized.
    """

    implementation = "prompt_tuning_jax.methods.ia3:IA3Module"
    for_images = True
    identity_at_init = True
    mergeable = True
    default_optimizer: ClassVar[Mapping[str, Any]] = {"learning_rate": 0.3, "weight_decay": 0.0}

    # Linear maps whose outputs are scaled: RE2 expressions that match a whole path, such as
    # ``encoder/layers_0/attention/key``.
    outputs: tuple[str, ...] = (".*/(key|value)",)
    inputs: tuple[str, ...] = (".*/mlp/wo",)  # linear maps whose inputs are scaled, likewise

    def config_errors(self) -> Iterator[str]:
        if not (self.outputs or self.inputs):
            yield "method.outputs and method.inputs are empty; give at least one regular expression"
        yield from pattern_errors(self.outputs, field="method.outputs")
        yield from pattern_errors(self.inputs, field="method.inputs")


@dataclass(frozen=True, kw_only=True)
class Adapters(MethodConfig):
    """``2 * D * width`` parameters per adapter, and ``width + D`` more with biases.

    An adapter transforms the output of a sublayer before it is added to the residual.  Its last
    matrix is initialized to zeros.  Layer norms stay frozen.  Frozen weights may be quantized.
    """

    implementation = "prompt_tuning_jax.methods.adapters:AdaptersModule"
    for_images = True
    identity_at_init = True
    default_optimizer: ClassVar[Mapping[str, Any]] = {"learning_rate": 0.005, "weight_decay": 0.0}
    lower_bounds: ClassVar[Mapping[str, float]] = {"width": 1}

    # ``houlsby``: adapters after every attention and every MLP, ``2 * encoder layers + 3 * decoder
    # layers`` in all; ``pfeiffer``: after every MLP, ``encoder layers + decoder layers`` in all.
    kind: Literal["houlsby", "pfeiffer"] = "houlsby"
    width: int = 32  # width of the bottleneck
    activation: Literal["gelu", "relu", "silu"] = "relu"  # activation in the bottleneck
    biases: bool = True  # whether the two linear maps have biases


@dataclass(frozen=True, kw_only=True)
class PatternTuning(MethodConfig):
    """The parameters of the model whose paths match; by default norms and all biases.

    BitFit trains biases.  T5 has none but its position biases, so the default trains ``D * (2 *
    encoder layers + 3 * decoder layers + 2)`` scales of norms and ``2 * H * buckets`` biases (with
    biases per layer, ``H * buckets * (encoder layers + decoder layers)``).  For images, the pattern
    ``classifier/.*`` is a linear probe.
    """

    implementation = "prompt_tuning_jax.methods.pattern:PatternModule"
    for_images = True
    identity_at_init = True
    mergeable = True
    default_optimizer: ClassVar[Mapping[str, Any]] = {"learning_rate": 0.1, "weight_decay": 0.0}

    # Parameters to train: RE2 expressions that match a whole path, such as
    # ``encoder/layers_0/mlp/wo/kernel``.
    patterns: tuple[str, ...] = (".*/(scale|bias|rel_embedding)",)

    def trains(self, name: str) -> bool:
        selected = is_selected(name, self.patterns, of="method.patterns")
        return selected or name.startswith(CLASSIFIER)

    def config_errors(self) -> Iterator[str]:
        if not self.patterns:
            yield "method.patterns is empty; give at least one regular expression"
        yield from pattern_errors(self.patterns, field="method.patterns")


@dataclass(frozen=True, kw_only=True)
class FullTuning(MethodConfig):
    """All parameters of the model ("model tuning" in Lester et al. 2021).

    Pre-training is this method, starting from random weights.
    """

    for_images = True
    trains_model = True
    identity_at_init = True
    mergeable = True
    default_optimizer: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 0.001,
        "multiply_by_parameter_scale": True,
        "min_dim_size_to_factor": 128,
        "weight_decay": 0.0,
    }

    def trains(self, name: str) -> bool:
        return True
