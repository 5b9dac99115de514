"""Configs of the methods that give layers keys and values, or vectors, of their own."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from prompt_tuning_jax.config.methods.base import (
    INIT_ONLY,
    Init,
    MethodConfig,
    dropout_errors,
    template_errors,
)
from prompt_tuning_jax.config.methods.prompts import PromptTuning


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(MethodConfig):
    """``2 * length * G * K * L`` parameters, where L counts the layers of all chosen attentions.

    G is the number of heads of keys and values.  A decoder-only model has one attention per layer,
    ``decoder``.

    With ``hidden`` M above 0, an MLP over vectors of the model's width D computes the prefixes of
    each attention during training (Li and Liang 2021, section 4.3): ``length * D + (D + 1) * M +
    (M + 1) * 2 * L * G * K`` parameters, initialized like torch's layers.  A run saves only the
    output of the MLP.
    """

    implementation = "prompt_tuning_jax.methods.prefix:Prefixes"
    for_images = True
    default_optimizer: ClassVar[Mapping[str, Any]] = {"learning_rate": 0.1}
    lower_bounds: ClassVar[Mapping[str, float]] = {"length": 1, "hidden": 0, "init_population": 0}
    training_only: ClassVar[Mapping[str, Any]] = {"init": "uniform", "init_population": 0}

    length: int = 20  # number of prefix positions
    encoder: bool = True  # add prefixes to the encoder's self-attention
    decoder: bool = True  # add prefixes to the decoder's self-attention
    cross: bool = True  # add prefixes to the cross-attention
    # Give prefixes the relative positions before the sequence, as in PEFT, instead of none.
    before: bool = False
    hidden: int = 0  # width of the MLP that computes the prefixes; 0: train them directly
    # Initial values without an MLP: keys and values that the model computes for the labels and
    # sampled tokens (``words``; Li and Liang 2021, section 7.4), or drawn from [-0.5, 0.5).
    init: Literal["words", "uniform"] = "words"
    init_population: int = 5000  # number of most common tokens to sample from; 0: all

    def context_positions(self) -> int:
        return self.length

    def chooses(self, stack: str) -> bool:
        """Returns whether a model's attentions of this name get prefixes.

        A name without a field of the method gets them.
        """
        return bool(getattr(self, stack, True))

    def config_errors(self) -> Iterator[str]:
        yield from super().config_errors()
        if not any((self.encoder, self.decoder, self.cross)):
            yield (
                "method.encoder, method.decoder and method.cross are all false; set at least one "
                "of them to true"
            )


@dataclass(frozen=True, kw_only=True)
class Cartridge(MethodConfig):
    """``2 * length * G * K * L`` parameters: the keys and values of a text, which training changes.

    A cartridge (Eyuboglu et al. 2025) is a prefix that starts as what the model computes for a text
    and holds its first positions, which models use as attention sinks, fixed.  L counts the layers
    of all attentions and G the heads of keys and values.  A run saves a prefix of ``PrefixTuning``.
    """

    implementation = "prompt_tuning_jax.methods.cartridge:CartridgePrefix"
    default_optimizer: ClassVar[Mapping[str, Any]] = {"learning_rate": 0.01, "weight_decay": 0.0}
    lower_bounds: ClassVar[Mapping[str, float]] = {"length": 1, "frozen": 0, "init_population": 0}
    training_only: ClassVar[Mapping[str, Any]] = {**INIT_ONLY, "frozen": 0}

    length: int = 128  # number of prefix positions
    frozen: int = 1  # number of first positions that keep their initial keys and values
    # Initial keys and values: those of the first tokens of a text (``text``) or of the labels and
    # sampled tokens (``words``), or drawn from [-0.5, 0.5).
    init: Literal["text", "words", "uniform"] = "words"
    init_text: str = ""  # text for ``init=text``
    init_path: str = ""  # text file for ``init=text``
    init_population: int = 5000  # number of most common tokens to sample from; 0: all

    def context_positions(self) -> int:
        return self.length

    def config_errors(self) -> Iterator[str]:
        yield from super().config_errors()
        if self.frozen >= self.length:
            yield f"method.frozen is {self.frozen}; must be below method.length, {self.length}"
        if self.init == "text" and bool(self.init_text) == bool(self.init_path):
            yield "method.init=text needs one of method.init_text and method.init_path, a text file"


@dataclass(frozen=True, kw_only=True)
class AdaptionPrompt(MethodConfig):
    """``(length * D + 1) * L`` parameters: a prompt and a gate for each of the top L layers.

    In LLaMA-Adapter (Zhang et al. 2023), every position of these layers also attends to the
    layer's prompt, by a softmax of its own, and the gate scales the result.  Gates start at zero,
    so that the model is at first unchanged.  Prompts have no positions and cost none of the
    window.  For decoder-only models and the encoder of T5Gemma.
    """

    implementation = "prompt_tuning_jax.methods.adaption_prompt:AdaptionPrompts"
    identity_at_init = True
    default_optimizer: ClassVar[Mapping[str, Any]] = {"learning_rate": 0.03, "weight_decay": 0.0}
    lower_bounds: ClassVar[Mapping[str, float]] = {"length": 1, "layers": 0}

    length: int = 10  # number of vectors of each layer
    layers: int = 0  # number of layers, from the top; 0: all
    # Whether what the prompt adds passes the attention's output map; PEFT's for GPT-2 does not.
    project: bool = True


@dataclass(frozen=True, kw_only=True)
class CPT(MethodConfig):
    """``(P - A) * D`` parameters: changes of the embeddings of P tokens, A of them of answers.

    Context-aware prompt tuning (Blau et al. 2024): a decoder-only model reads labeled examples
    before each input, as in few-shot prompting, and training changes the embeddings of all their
    tokens but the answers' by a bounded amount.  The loss also covers the answers in the context.
    All members of an ensemble have the same context.  A run saves a plain prompt of
    ``PromptTuning``.
    """

    implementation = "prompt_tuning_jax.methods.cpt:ContextPrompt"
    has_own_loss = True
    saves_prompts = True
    default_optimizer: ClassVar[Mapping[str, Any]] = {"learning_rate": 0.001, "weight_decay": 0.0}
    lower_bounds: ClassVar[Mapping[str, float]] = {
        "shots": 1,
        "length": 1,
        "epsilon": 0,
        "format_epsilon": 0,
    }

    # Number of examples drawn from the training split, with the first of ``training.seeds``.
    shots: int = 8
    # Whether every label occurs equally often among the examples; without effect for tasks without
    # labels.
    balance: Literal["balanced", "as_drawn"] = "balanced"
    examples: tuple[str, ...] = ()  # inputs and targets in turns; empty: drawn
    # Template of an example; each part of it is tokenized separately.
    demonstration: str = "{inputs}{targets}"
    length: int = 256  # number of tokens in which the examples must fit; the last are left out
    # Bound on the norm of an input token's change, for models of width 2048; for other widths it is
    # proportional to their square root.
    epsilon: float = 0.1
    format_epsilon: float = 0.1  # the same for tokens of the template
    # Factor on the loss of an answer in the context for each answer that follows it.
    decay: float = 0.95

    def prompt_positions(self) -> int:
        """Returns the most that there can be, because the number depends on the vocabulary."""
        return self.length

    def num_context_examples(self) -> int:
        return 0 if self.examples else self.shots

    def balances_labels(self) -> bool:
        return self.balance == "balanced"

    def plain_prompt(self) -> PromptTuning:
        return PromptTuning()

    def config_errors(self) -> Iterator[str]:
        yield from super().config_errors()
        yield from template_errors(self, demonstration=["inputs", "targets"])
        if not 0 <= self.decay <= 1:
            yield f"method.decay is {self.decay}; must be from 0 to 1"
        if len(self.examples) % 2:
            yield (
                f"method.examples has {len(self.examples)} texts; it takes inputs and targets in "
                "turns"
            )


@dataclass(frozen=True, kw_only=True)
class DeepPrompts(MethodConfig):
    """``(P_0 + P_1 + ...) * D`` parameters: P_i vectors for layer i of what reads the input.

    The first layer's vectors are prepended to the input, as in prompt tuning.  Those of a later
    layer change the first P_i positions of its input.

    With ``hidden`` M above 0, one MLP over P_0 vectors computes the vectors of all L layers during
    training: ``P_0*D + (D + 1)*M + (M + 1)*L*D`` parameters.  A run saves only the output of the
    MLP.
    """

    implementation = "prompt_tuning_jax.methods.deep:LayerPrompts"
    for_images = True
    lower_bounds: ClassVar[Mapping[str, float]] = {"length": 1, "hidden": 0, "init_population": 0}
    training_only: ClassVar[Mapping[str, Any]] = {**INIT_ONLY, "dropout": 0.0}

    length: int = 20  # number of vectors of each layer
    # Number of vectors by layer, instead of ``length``: at most as many as in the first layer.
    lengths: tuple[int, ...] = ()
    # Later layers: replace the first positions, or add to them, starting from zeros.
    mode: Literal["replace", "add"] = "replace"
    hidden: int = 0  # width of the MLP that computes the vectors; 0: train them directly
    # Initial values without an MLP, as for prompt tuning; in later layers ``mode=add`` ignores it.
    init: Init = "sampled_vocabulary"
    init_text: str = ""  # text for ``init=string``
    init_path: str = ""  # prompt file for ``init=file``
    init_population: int = 5000  # number of most common tokens to sample from; 0: all
    dropout: float = 0.0  # dropout on the vectors, different for each example

    def prompt_positions(self) -> int:
        return self.lengths[0] if self.lengths else self.length

    def uses_rng(self) -> bool:
        return self.dropout > 0

    def config_errors(self) -> Iterator[str]:
        yield from super().config_errors()
        yield from dropout_errors(self.dropout)
        if self.lengths and not 0 < max(self.lengths) == self.lengths[0]:
            yield (
                f"method.lengths is {','.join(map(str, self.lengths))}; the first must be at least "
                "1, and none may be larger than the first"
            )
        if self.lengths and min(self.lengths) < 0:
            yield f"method.lengths has {min(self.lengths)}; must be at least 0"
