"""Configuration of decoder-only language models: one stack of layers with switches."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

from prompt_tuning_jax.models.config import ModelConfig

Norm: TypeAlias = Literal["rms", "rms_plus_one", "layer", "layer_without_weights"]
RopeKind: TypeAlias = Literal["linear", "llama3", "yarn"]
Positions: TypeAlias = Literal["rope", "learned", "alibi"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for longer contexts.

    ``linear`` divides all frequencies by ``factor``.  ``llama3`` divides those whose wavelength is
    longer than ``original_max_positions / low_freq_factor``, keeps those shorter than
    ``original_max_positions / high_freq_factor``, and interpolates in between.  ``yarn`` (Peng et
    al. 2023) keeps those that turn more than ``beta_fast`` times in ``original_max_positions``,
    divides those that turn less than ``beta_slow`` times, interpolates by index in between, and
    multiplies cosines and sines by ``attention_factor``; ``truncate`` rounds the bounds to whole
    indices.  All as in transformers, modeling_rope_utils.py.
    """

    kind: RopeKind
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


def yarn_attention_factor(factor: float, scale: float = 1.0) -> float:
    """Returns what YaRN multiplies cosines and sines by, for frequencies divided by ``factor``."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


@dataclass(frozen=True, kw_only=True)
class Window:
    """Which positions of its own sequence a query sees.

    ``back`` is their number up to its own position, and 0 is all before it.  ``ahead`` is the
    number of later positions, and None is all of them.
    """

    back: int
    ahead: int | None = 0


@dataclass(frozen=True, kw_only=True)
class CausalLMConfig(ModelConfig):
    """The architecture of a decoder-only language model.

    Attributes:
      model_type: Hugging Face's name of the architecture, such as ``llama``.
      num_layers: the number of layers L.
      num_kv_heads: the heads G of keys and values; each serves H / G heads of queries.
      max_positions: the model's window; prompt, input and target must fit in it.
      mlp_activations: one per input projection of the mlp: two for a gated mlp.
      norm: ``rms`` multiplies by w, ``rms_plus_one`` by 1 + w; ``layer`` is LayerNorm.
      norm_eps: added to the mean square (or the variance) before the root.
      pre_norms: norms before the attention and the mlp.
      post_norms: norms after the attention and the mlp, before the residual addition.
      parallel_residual: the attention and the mlp read the same residual (GPT-NeoX, Phi).
      shared_norm: with ``parallel_residual``, one norm feeds both (Phi).
      final_norm: a norm after the last layer.
      embedding_norm: a LayerNorm after the embedding, which prompts pass, too (BLOOM).
      embedding_scale: a factor on token embeddings, which prompts do not get (Gemma).
      positions: how positions enter.
      position_offset: the row of the first position in a learned table (OPT: 2).
      rope_theta: the base of the rotary frequencies.
      rope_local_theta: their base in layers with a window; None is ``rope_theta``.
      rope_scaling: their scaling, in layers without a window alone if there is a local base.
      rotary_dim: how many of a head's numbers are rotated; 0 is all.
      windows: for each layer the number of positions that a query sees, itself included; 0 is all.
        An empty tuple is 0 everywhere.
      query_scale: a factor on the scores.
      qk_norm: a norm of each head's queries and keys (Qwen 3, Gemma 3), or of all heads together.
      attention_softcap: caps scores at ``c * tanh(scores / c)``; 0 does not.
      logits_softcap: caps logits likewise.
      qkv_clip: queries, keys and values are clipped to between minus this and this (OLMo); 0 does
        not clip.
      qkv_bias: biases of queries, keys and values.
      out_bias: a bias of the attention's output.
      mlp_bias: biases in the mlp.
      logits_bias: a bias of the logits.
      tie_embeddings: the embedding table is the output head, and there is no
        ``decoder/logits_dense``.
      bos: the id of the token that begins a text, for files that are written; -1 if there is none.
        Whether an input begins with it is up to the vocabulary.
    """

    implementation: ClassVar[str] = "prompt_tuning_jax.models.causal_lm.model:CausalLM"

    model_type: str
    num_layers: int
    num_kv_heads: int
    max_positions: int  # type: ignore[misc]  # a field here
    mlp_activations: tuple[str, ...] = ("silu", "linear")
    norm: Norm = "rms"
    norm_eps: float = 1e-6
    pre_norms: bool = True
    post_norms: bool = False
    parallel_residual: bool = False
    shared_norm: bool = False
    final_norm: bool = True
    embedding_norm: bool = False
    embedding_scale: float = 1.0
    positions: Positions = "rope"
    position_offset: int = 0
    rope_theta: float = 10_000.0
    rope_local_theta: float | None = None
    rope_scaling: RopeScaling | None = None
    rotary_dim: int = 0
    windows: tuple[int, ...] = ()
    query_scale: float = 1.0
    qk_norm: Literal["none", "head", "all"] = "none"
    attention_softcap: float = 0.0
    logits_softcap: float = 0.0
    qkv_clip: float = 0.0
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    logits_bias: bool = False
    tie_embeddings: bool = False
    bos: int = -1

    @property
    def num_reading_layers(self) -> int:
        return self.num_layers

    def forward_flops(
        self, *, rows: int, prompt_length: int, inputs_length: int, targets_length: int
    ) -> float:
        own = inputs_length + targets_length - 1  # the last input predicts the first target
        # The prompt is computed once for all rows.
        positions = prompt_length + rows * own
        scores = prompt_length**2 + rows * own * (prompt_length + own)
        layer = positions * self.layer_weights + 2 * self.num_heads * self.head_dim * scores
        head = rows * targets_length * self.embed_dim * self.vocab_size
        return 2.0 * (self.num_layers * layer + head)

    @property
    def layer_weights(self) -> int:
        """The weights of a layer's self-attention and mlp, which each position is multiplied by."""
        heads = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        return self.embed_dim * (heads + (len(self.mlp_activations) + 1) * self.mlp_dim)

    def window(self, layer: int) -> int:
        """Returns the window of a layer; 0 is none."""
        return self.windows[layer] if self.windows else 0

    def causal_windows(self) -> tuple[Window, ...]:
        """Returns what the queries of each layer see."""
        return tuple(Window(back=self.window(i)) for i in range(self.num_layers))
