"""What every model's configuration has, and its special token ids; without JAX."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class TokenIds:
    """The special token ids: padding, end of sequence, and decoder start.

    They come from the model's files.  The ids of its vocabulary may differ; the vocabulary's
    end-of-sequence id is the one appended to inputs.

    Attributes:
      pad: fills generated sequences after their end.
      eos: ends a target.
      start: the first input of an encoder-decoder's decoder; -1 if the model has no such token.
      more_eos: other ids that end a generated sequence.
      inputs_have_eos: whether the inputs of an encoder-decoder end with an end of sequence, as a
        T5's do and a T5Gemma's do not.
      image: stands for a part of an image, which inputs cannot have; -1 if there is no such token.
    """

    pad: int = 0
    eos: int = 1
    start: int = 0
    more_eos: tuple[int, ...] = ()
    inputs_have_eos: bool = True
    image: int = -1

    @property
    def fill(self) -> int:
        """The value that marks empty positions in token arrays.

        This is 0 in an encoder-decoder if ``pad`` is 0 and ``eos`` is not, because then no text
        contains it.  Otherwise the padding id may also be a real token, and this is -1.
        """
        return 0 if self.pad == 0 and self.start >= 0 and 0 not in self.all_eos else -1

    @property
    def inputs_end(self) -> bool:
        """Whether inputs end with an end of sequence.

        A decoder-only model continues its input, which therefore has no end.
        """
        return self.start >= 0 and self.inputs_have_eos

    @property
    def all_eos(self) -> tuple[int, ...]:
        """Every id that ends a generated sequence."""
        return (self.eos, *self.more_eos)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The sizes that every family has; a family's configuration adds its own fields.

    Attributes:
      vocab_size: the rows of the embedding table, padding included; of a model that reads images
        the number of classes.
      embed_dim: the width D of the hidden states, and so of a prompt.
      num_heads: the heads H of an attention.
      head_dim: the width K of a head.
      mlp_dim: the width F inside an mlp.
      token_ids: the special token ids.
    """

    # "module:class" of the model with such a configuration.
    implementation: ClassVar[str]
    # The longest sequence that the model reads and writes, prompt included; None has no limit.
    max_positions: ClassVar[int | None] = None
    # An input is an image, and the model chooses among classes; otherwise both are text.
    reads_images: ClassVar[bool] = False

    vocab_size: int
    embed_dim: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    token_ids: TokenIds = TokenIds()

    def input_positions(self, length: int) -> int:
        """Returns the positions that an input of ``length`` numbers has: one for each token."""
        return length

    @property
    def peft_prompt_scale(self) -> float:
        """The factor from a prompt that PEFT gives transformers' model to the same one here."""
        return 1.0

    def prompt_reach(self) -> tuple[int, ...]:
        """Returns how many positions back, its own included, each reading layer's queries see.

        0 is all; empty if that is so in every layer, or if the model is decoder-only.
        """
        return ()

    @property
    def num_reading_layers(self) -> int:
        """The layers that the input, and so a prompt, passes."""
        raise NotImplementedError

    def forward_flops(
        self, *, rows: int, prompt_length: int, inputs_length: int, targets_length: int
    ) -> float:
        """Returns the FLOPs of the matrix products of one forward pass over ``rows`` examples."""
        raise NotImplementedError
