"""How long a step takes at the least, by what the chip can do at most."""

from dataclasses import dataclass

from prompt_tuning_jax.models.t5.config import T5Config
from prompt_tuning_jax.planning.chips import Chip
from prompt_tuning_jax.planning.program import Program


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """Seconds a step for each thing alone, at published peaks.

    Collectives go around a ring along one axis of the torus (a small slice has no link that closes
    it, and is slower).  ``step`` takes arithmetic and memory to overlap wholly, and collectives to
    overlap with neither.
    ``floor`` is the model's own matrix products at the chip's peak: what no program can beat.
    """

    compute: float
    memory: float
    collectives: float
    floor: float

    @property
    def step(self) -> float:
        return max(self.compute, self.memory) + self.collectives

    @property
    def utilisation(self) -> float:
        """Model FLOPs utilisation: the floor's share of the step."""
        return self.floor / self.step if self.step else 0.0


def roofline(program: Program, chip: Chip, *, model_flops: float, chips: int) -> Roofline:
    """The walls of a compiled program on so many chips."""
    return Roofline(
        compute=program.flops / chip.flops,
        memory=program.bytes_accessed / chip.hbm_bandwidth,
        collectives=sum(c.sent for c in program.collectives) / chip.ring_bandwidth,
        floor=model_flops / chips / chip.flops,
    )


def model_flops(
    config: T5Config,
    *,
    rows: int,
    encoder_length: int,
    targets_length: int,
    weights_train: bool,
) -> float:
    """FLOPs of one step's matrix products, nothing computed twice.

    ``rows`` are examples of all members, ``encoder_length`` counts prompt and input.  Forward and
    the gradients of activations, for weights that train theirs too.
    """
    joined, width = config.num_heads * config.head_dim, config.embed_dim
    mlp = (len(config.mlp_activations) + 1) * width * config.mlp_dim
    attention = 4 * width * joined
    read, written = rows * encoder_length, rows * targets_length
    encoder = config.num_encoder_layers * read * (attention + mlp + 2 * joined * encoder_length)
    decoder = config.num_decoder_layers * (
        read * 2 * width * joined  # keys and values of cross attention
        + written * (attention + attention / 2 + mlp)
        + written * 2 * joined * (targets_length + encoder_length)
    )
    forward = 2.0 * (encoder + decoder + written * width * config.vocab_size)
    return forward * (3 if weights_train else 2)
