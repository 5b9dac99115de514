"""Configuration of T5Gemma encoder-decoders: two stacks of Gemma's layers."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from prompt_tuning_jax.models.causal_lm.config import CausalLMConfig, Window
from prompt_tuning_jax.models.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class T5GemmaConfig(ModelConfig):
    """The architecture of a T5Gemma (Zhang et al. 2025) or of the text part of a T5Gemma 2.

    The sizes that ``ModelConfig`` has are those of the encoder, which reads the prompt.

    Attributes:
      model_type: Hugging Face's name of the architecture.  A ``t5gemma`` has Gemma 2's layers,
        separate cross-attention, and an embedding table for each stack.  A ``t5gemma2`` has Gemma
        3's layers, a decoder that attends to its own positions and to the encoder's output in one
        attention, and one table if this is also the output head.
      encoder: the layers that read.  Their windows extend to both sides.
      decoder: the layers that write.  ``decoder.tie_embeddings`` says whether the decoder's table
        is the output head.
      eoi: the id of T5Gemma 2's end of an image, which has an embedding of its own; -1 if there is
        none.
    """

    implementation: ClassVar[str] = "prompt_tuning_jax.models.t5gemma.model:T5Gemma"

    vocab_size: int = field(init=False)
    embed_dim: int = field(init=False)
    num_heads: int = field(init=False)
    head_dim: int = field(init=False)
    mlp_dim: int = field(init=False)
    model_type: Literal["t5gemma", "t5gemma2"]
    encoder: CausalLMConfig
    decoder: CausalLMConfig
    eoi: int = -1

    def __post_init__(self) -> None:
        for name in ("vocab_size", "embed_dim", "num_heads", "head_dim", "mlp_dim"):
            object.__setattr__(self, name, getattr(self.encoder, name))

    @property
    def merged(self) -> bool:
        """Whether the decoder has one attention for both, as in T5Gemma 2."""
        return self.model_type == "t5gemma2"

    @property
    def shares_table(self) -> bool:
        """Whether encoder, decoder and output head have one table."""
        return self.merged and self.tie_embeddings

    @property
    def tie_embeddings(self) -> bool:
        """Whether an embedding table is the output head."""
        return self.decoder.tie_embeddings

    @property
    def embedding_scale(self) -> float:
        """The factor on the embeddings of input tokens, which prompts do not get."""
        return self.encoder.embedding_scale

    @property
    def peft_prompt_scale(self) -> float:
        # transformers' T5Gemma multiplies what it gets instead of embeddings by their factor.
        return 1.0 if self.merged else self.embedding_scale

    def prompt_reach(self) -> tuple[int, ...]:
        return tuple(window.back for window in self.encoder_windows())

    @property
    def num_reading_layers(self) -> int:
        return self.encoder.num_layers

    def encoder_windows(self) -> tuple[Window, ...]:
        """Returns what the queries of each encoder layer see.

        A window w of T5Gemma has w positions on each side, the query's own included, as in
        DeepMind's implementation and transformers 4 (transformers 5 sees one more).  In T5Gemma 2
        it has w positions in total and the one in the middle.
        """
        seen = []
        for i in range(self.encoder.num_layers):
            w = self.encoder.window(i)
            if not w:
                seen.append(Window(back=0, ahead=None))
            elif self.merged:
                seen.append(Window(back=(w + 1) // 2, ahead=w // 2))
            else:
                seen.append(Window(back=w, ahead=w - 1))
        return tuple(seen)

    def forward_flops(
        self, *, rows: int, prompt_length: int, inputs_length: int, targets_length: int
    ) -> float:
        read_length = prompt_length + inputs_length
        read, written = rows * read_length, rows * targets_length
        encoder, decoder = self.encoder, self.decoder
        joined, kv = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
        kept = kv * encoder.embed_dim
        cross = 0 if self.merged else decoder.embed_dim * joined  # queries, or outputs
        scores = 2 * encoder.num_heads * encoder.head_dim * read_length
        flops = encoder.num_layers * read * (encoder.layer_weights + scores)
        flops += decoder.num_layers * (
            read * 2 * kept
            + written * (decoder.layer_weights + 2 * cross)
            + 2 * joined * written * (targets_length + read_length)
        )
        return 2.0 * (flops + written * decoder.embed_dim * decoder.vocab_size)
