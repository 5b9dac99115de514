"""Configs of the methods whose parameters become a prompt in the input."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

from prompt_tuning_jax.config.methods.base import (
    INIT_ONLY,
    Init,
    MethodConfig,
    PromptAttention,
    alpha_errors,
    dropout_errors,
)
from prompt_tuning_jax.config.prompt_template import PromptTemplate, parse_prompt_template
from prompt_tuning_jax.errors import UserError

Placement = Literal["prefix", "after_first", "before_eos"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
MultitaskInit = Literal[Init, "source"]
Combine = Literal["low_rank", "sum", "concatenation", "features", "projection"]


@dataclass(frozen=True, kw_only=True)
class PromptTuning(MethodConfig):
    """``(length + decoder_length) * D`` parameters: ``method/prompt_PD``, float32, in the input.

    The decoder of an encoder-decoder gets no prompt, except for that of a T5 with
    ``decoder_length``: ``method/decoder_prompt_PD``, before its start token.
    """

    implementation = "prompt_tuning_jax.methods.prompt:Prompt"
    for_images = True
    saves_prompts = True
    lower_bounds: ClassVar[Mapping[str, float]] = {
        "length": 0,
        "decoder_length": 0,
        "init_population": 0,
    }
    training_only: ClassVar[Mapping[str, Any]] = {**INIT_ONLY, "init_labels": (), "dropout": 0.0}

    length: int = 100  # number of prompt vectors; 0 only with ``decoder_length``
    # T5: number of prompt vectors before the decoder's start token, initialized like the others.
    decoder_length: int = 0
    # Initial values: ``uniform`` in [-0.5, 0.5), ``uniform_positive`` in [0, 0.5), embeddings of
    # sampled tokens, of the labels, or of ``init_text`` (``string``), labels combined with sampled
    # tokens (``described``), or a ``file``.  For images: ``xavier_uniform``, in [-v, v) with v =
    # sqrt(6 / (pixels of a patch + D)).
    init: Init = "class_labels"
    init_labels: tuple[str, ...] = ()  # labels to initialize from; empty: the task's
    init_text: str = ""  # text for ``init=string``
    init_path: str = ""  # prompt file for ``init=file``
    init_population: int = 5000  # number of most common tokens to sample from; 0: all
    # Before the input, after its first token, or before its end-of-sequence token.
    placement: Placement = "prefix"
    prompt_to_input: bool = True  # prompt positions attend to the input
    # Which prompt positions a prompt position attends to: ``all``, itself and earlier ones
    # (``causal``), or only itself (``none``).
    prompt_to_prompt: PromptAttention = "all"
    input_to_prompt: bool = True  # input positions attend to the prompt
    dropout: float = 0.0  # dropout on the prompt's vectors, different for each example

    def prompt_positions(self) -> int:
        return self.length

    def uses_rng(self) -> bool:
        return self.dropout > 0

    def config_errors(self) -> Iterator[str]:
        yield from super().config_errors()
        yield from dropout_errors(self.dropout)
        if not self.length and not self.decoder_length:
            yield "method.length is 0; must be at least 1, or set method.decoder_length"
        if self.decoder_length and self.init == "file":
            yield (
                "method.init=file is a prompt of the encoder alone, and method.decoder_length is "
                f"{self.decoder_length}; set it to 0, or choose another method.init"
            )

    def plain_prompt(self) -> "PromptTuning | None":
        return None if self.decoder_length else _joined_as(self)


def _joined_as(method: "PromptTuning | MultitaskPrompts") -> PromptTuning:
    """Returns prompt tuning that joins a prompt to the input as ``method`` does."""
    return PromptTuning(
        placement=method.placement,
        prompt_to_input=method.prompt_to_input,
        prompt_to_prompt=method.prompt_to_prompt,
        input_to_prompt=method.input_to_prompt,
    )


@dataclass(frozen=True, kw_only=True)
class PTuning(MethodConfig):
    """A prompt of P vectors of the model's width D, computed by an encoder during training.

    P is the number of trained vectors in ``template``.  With ``hidden`` M (0: D) the parameters are

    - ``mlp``: ``P*D + (D + 1)*M + (M + 1)*M + (M + 1)*D``,
    - ``lstm``, two bidirectional layers and an MLP: ``P*D + 10*M*D + 36*M**2 + 34*M + D``,
    - ``none``: ``P*D``, the prompt itself.

    A run saves the computed prompt, including the anchor words.  If all of it is on one side of the
    input, the run saves a plain prompt of ``PromptTuning``.  The encoders are those of peft 0.21,
    tuners/p_tuning/model.py.
    """

    implementation = "prompt_tuning_jax.methods.p_tuning:EncodedPrompt"
    saves_prompts = True
    default_optimizer: ClassVar[Mapping[str, Any]] = {"learning_rate": 0.003}
    lower_bounds: ClassVar[Mapping[str, float]] = {"length": 1, "hidden": 0}
    training_only: ClassVar[Mapping[str, Any]] = {"dropout": 0.0}

    length: int = 20  # number of trained vectors for each ``{prompt}`` of the template
    # Arrangement of trained vectors, anchor words and input, for instance ``{prompt:3} It is about
    # {prompt} {input}``; ``{prompt:3}`` has 3 vectors.
    template: str = "{prompt} {input}"
    encoder: Literal["lstm", "mlp", "none"] = "lstm"  # network that computes the prompt
    hidden: int = 0  # width of the encoder's hidden layers; 0: the model's width
    dropout: float = 0.0  # dropout between the layers of the LSTM

    def parsed_template(self) -> PromptTemplate:
        """Returns the parsed ``template``; UserError if it is invalid."""
        template = parse_prompt_template(self.template, length=self.length)
        if not template.prompt_length:
            raise UserError(f"method.template: {self.template!r} has no {{prompt}}; add one")
        return template

    def prompt_positions(self) -> int:
        """Without the anchors, whose number depends on the vocabulary."""
        return self.parsed_template().prompt_length

    def uses_rng(self) -> bool:
        return self.dropout > 0

    def config_errors(self) -> Iterator[str]:
        yield from super().config_errors()
        yield from dropout_errors(self.dropout)
        if self.dropout and self.encoder != "lstm":
            yield (
                f"method.dropout is {self.dropout} and method.encoder is {self.encoder}; only "
                "method.encoder=lstm has dropout"
            )
        self.parsed_template()


@dataclass(frozen=True, kw_only=True)
class ResidualPrompt(MethodConfig):
    """A prompt of P vectors, to which an MLP's output for them is added during training.

    Residual prompt tuning (Razdaibiedina et al. 2023) uses a bottleneck MLP of width M = ``hidden``
    followed by a layer norm: ``P*D + (2*D + 1)*M + 3*D`` parameters if the positions share it,
    ``P*D + P*((2*D + 1)*M + 3*D)`` if each has its own, and 2*D fewer per MLP without the norm.  A
    run saves the sum, a plain prompt of ``PromptTuning``.
    """

    implementation = "prompt_tuning_jax.methods.residual_prompt:SkippedPrompt"
    saves_prompts = True
    default_optimizer: ClassVar[Mapping[str, Any]] = {"rates": ("method/mlp/.*=0.01",)}
    lower_bounds: ClassVar[Mapping[str, float]] = {"length": 1, "hidden": 1, "init_population": 0}
    training_only: ClassVar[Mapping[str, Any]] = {**INIT_ONLY, "dropout": 0.0}

    length: int = 10  # number of prompt vectors
    network: Literal["shared", "separate"] = "shared"  # one MLP for all positions, or one for each
    hidden: int = 400  # width of the MLP's hidden layer
    # Layer norm on the output of the MLP, as in the paper.  Its initial output has unit variance,
    # which is large where a model's embeddings are small.
    layer_norm: bool = True
    dropout: float = 0.0  # dropout on the MLP's output
    init: Init = "sampled_vocabulary"  # initial values of the prompt, as for prompt tuning
    init_text: str = ""  # text for ``init=string``
    init_path: str = ""  # prompt file for ``init=file``
    init_population: int = 5000  # number of most common tokens to sample from; 0: all

    def prompt_positions(self) -> int:
        return self.length

    def uses_rng(self) -> bool:
        return self.dropout > 0

    def plain_prompt(self) -> PromptTuning:
        return PromptTuning()

    def config_errors(self) -> Iterator[str]:
        yield from super().config_errors()
        yield from dropout_errors(self.dropout)


@dataclass(frozen=True, kw_only=True)
class SuperPosPrompt(MethodConfig):
    """``P * M`` parameters: the weights of M token embeddings in each of P prompt vectors.

    In SuperPos-Prompt (SadraeiJavaheri et al. 2024) a prompt vector is a superposition of the
    embeddings of M = ``num_tokens`` sampled tokens, the same for all positions.  The weights are
    drawn from a normal distribution of variance 1/M, so vectors start about as long as embeddings.
    With ``trains_embeddings`` the M embeddings train, too: ``M * D`` parameters more.  A run saves
    a plain prompt of ``PromptTuning``.
    """

    implementation = "prompt_tuning_jax.methods.superpos_prompt:Superposition"
    saves_prompts = True
    default_optimizer: ClassVar[Mapping[str, Any]] = {"learning_rate": 0.03}
    lower_bounds: ClassVar[Mapping[str, float]] = {
        "length": 1,
        "num_tokens": 1,
        "sample_seed": 0,
        "init_population": 0,
    }

    length: int = 10  # number of prompt vectors
    num_tokens: int = 128  # number of sampled tokens
    sample_seed: int = 0  # seed of the sample, which all members of an ensemble share
    init_population: int = 5000  # number of most common tokens to sample from; 0: all
    trains_embeddings: bool = False  # also train the sampled tokens' embeddings

    def prompt_positions(self) -> int:
        return self.length

    def plain_prompt(self) -> PromptTuning:
        return PromptTuning()


@dataclass(frozen=True, kw_only=True)
class DePT(MethodConfig):
    """``P * D + R * (T + D)`` parameters: a prompt, and offsets of the input by position.

    Decomposed prompt tuning (Shi and Lipani 2024) adds row t of the product of ``offset_a_TR`` and
    ``offset_b_RD``, times ``alpha / sqrt(rank)``, to the embedding of an input's token t, and puts
    a prompt before the result.  The prompt is shorter than one with as many parameters, so that
    inputs are shorter, too.  T is ``max_length``.  In a decoder-only model, targets have no
    offsets, in training as in generation.
    """

    implementation = "prompt_tuning_jax.methods.dept:PositionOffsets"
    default_optimizer: ClassVar[Mapping[str, Any]] = {"rates": ("method/offset_.*=0.1",)}
    lower_bounds: ClassVar[Mapping[str, float]] = {
        "length": 1,
        "rank": 1,
        "max_length": 1,
        "init_population": 0,
    }
    training_only: ClassVar[Mapping[str, Any]] = INIT_ONLY

    length: int = 40  # number of prompt vectors
    rank: int = 45  # rank of the offsets
    alpha: float = 8.0  # offsets are scaled by ``alpha / sqrt(rank)``
    max_length: int = 256  # number of input positions with an offset; later ones have none
    init: Init = "sampled_vocabulary"  # initial values of the prompt, as for prompt tuning
    init_text: str = ""  # text for ``init=string``
    init_path: str = ""  # prompt file for ``init=file``
    init_population: int = 5000  # number of most common tokens to sample from; 0: all

    @property
    def scale(self) -> float:
        """The factor on the product."""
        return self.alpha / self.rank**0.5

    def prompt_positions(self) -> int:
        return self.length

    def config_errors(self) -> Iterator[str]:
        yield from super().config_errors()
        yield from alpha_errors(self.alpha)


@dataclass(frozen=True, kw_only=True)
class ADePT(MethodConfig):
    """``P*D + (2*D + 1)*M + D`` parameters: a prompt, and offsets of the input by token.

    Adaptive decomposed prompt tuning (Tang et al. 2025) adds to the embedding of each input token
    the output of a network that reads this embedding, with one hidden layer of width M =
    ``hidden`` and relu, and puts a prompt before the result.  In a decoder-only model, targets have
    no offsets, in training as in generation.
    """

    implementation = "prompt_tuning_jax.methods.adept:TokenOffsets"
    default_optimizer: ClassVar[Mapping[str, Any]] = {"rates": ("method/offset_.*=0.1",)}
    lower_bounds: ClassVar[Mapping[str, float]] = {"length": 1, "hidden": 1, "init_population": 0}
    training_only: ClassVar[Mapping[str, Any]] = INIT_ONLY

    length: int = 60  # number of prompt vectors
    hidden: int = 19  # width of the network's hidden layer
    init: Init = "sampled_vocabulary"  # initial values of the prompt, as for prompt tuning
    init_text: str = ""  # text for ``init=string``
    init_path: str = ""  # prompt file for ``init=file``
    init_population: int = 5000  # number of most common tokens to sample from; 0: all

    def prompt_positions(self) -> int:
        return self.length


@dataclass(frozen=True, kw_only=True)
class WARP(MethodConfig):
    """``(P + C) * D`` parameters: P prompt vectors, and a vector for each of the C labels.

    P is the number of trained vectors in ``template``, and may be 0.  A label's score is the
    product of its vector with the input of the output head at the decoder's first position.  The
    label's vector is initialized with the head's vector for the label's first token, so that the
    initial scores are the logits of these tokens.  The method cannot generate text.
    """

    implementation = "prompt_tuning_jax.methods.warp:ClassVectors"
    scores_labels = True
    has_own_loss = True
    default_optimizer: ClassVar[Mapping[str, Any]] = {"rates": ("method/class_CD=0.01",)}
    lower_bounds: ClassVar[Mapping[str, float]] = {"length": 1, "init_population": 0}
    training_only: ClassVar[Mapping[str, Any]] = INIT_ONLY

    length: int = 8  # number of trained vectors for each ``{prompt}`` of the template
    # Arrangement of trained vectors, anchor words and input, for instance ``{prompt:3} It is about
    # {prompt} {input}``; ``{prompt:3}`` has 3 vectors.
    template: str = "{prompt} {input}"
    init: Init = "sampled_vocabulary"  # initial values of the prompt, as for prompt tuning
    init_text: str = ""  # text for ``init=string``
    init_path: str = ""  # prompt file for ``init=file``
    init_population: int = 5000  # number of most common tokens to sample from; 0: all

    def parsed_template(self) -> PromptTemplate:
        """Returns the parsed ``template``; UserError if it is invalid."""
        return parse_prompt_template(self.template, length=self.length)

    def prompt_positions(self) -> int:
        """Without the anchors, whose number depends on the vocabulary."""
        return self.parsed_template().prompt_length

    def config_errors(self) -> Iterator[str]:
        yield from super().config_errors()
        self.parsed_template()


@dataclass(frozen=True, kw_only=True)
class MultitaskPrompts(MethodConfig):
    """A prompt shared by N tasks, combined with parameters of each task, in the input.

    With P = ``length``, D the model's width, R = ``rank``, Q = ``task_length`` and S =
    ``shared_features``, ``combine`` is

    - ``low_rank``: shared * (cols[task] @ rows[task]), as in MPT; ``P*D + N*R*(P + D)`` parameters,
    - ``sum``: shared + task's; ``P*D + N*P*D``,
    - ``concatenation``: shared, then Q vectors of the task; ``P*D + N*Q*D``,
    - ``features``: each vector is S shared features, then D - S of the task; ``P*S + N*P*(D - S)``,
    - ``projection``: an affine map of each task takes the S shared features of each vector to D;
      ``P*S + N*(S + 1)*D``.

    By default the prompts of all tasks are initialized close to each other; in a concatenation,
    ``init`` also initializes the task's vectors.
    """

    implementation = "prompt_tuning_jax.methods.multitask:TaskPrompts"
    has_tasks = True
    lower_bounds: ClassVar[Mapping[str, float]] = {
        "length": 1,
        "init_population": 0,
        "rank": 1,
        "task_length": 1,
        "shared_features": 0,
        "decoder_length": 0,
        "tasks": 0,
        "source_member": 0,
        "source_task": -1,
    }
    training_only: ClassVar[Mapping[str, Any]] = {
        **INIT_ONLY,
        "tasks_init": "near",
        "source_task": -1,
        "source_member": 0,
    }

    length: int = 100  # number of vectors of the shared prompt
    # T5: number of vectors before the decoder's start token, which are combined likewise and add to
    # ``length`` in the numbers of parameters; 0 for ``combine=concatenation``.
    decoder_length: int = 0
    combine: Combine = "low_rank"  # how shared and task parameters make a prompt
    rank: int = 1  # rank of the tasks' factors, for ``combine=low_rank``
    task_length: int = 20  # number of vectors of each task, for ``combine=concatenation``
    # Number of features of the shared vectors, for ``features`` (0: half the model's width) and
    # ``projection`` (0: the model's width).
    shared_features: int = 0
    tasks: int = 0  # number of tasks; 0: as many as in the data
    # Initial values, as for prompt tuning; ``source``: those of another run with the same
    # ``combine`` and sizes, as in the target stage of MPT.
    init: MultitaskInit = "sampled_vocabulary"
    init_text: str = ""  # text for ``init=string``
    init_path: str = ""  # prompt file for ``init=file``, or run folder for ``init=source``
    init_population: int = 5000  # number of most common tokens to sample from; 0: all
    # Initial values of the tasks' parameters: so that all prompts are ``near`` each other, or drawn
    # like those of ``init``, each on its own.
    tasks_init: Literal["near", "uniform", "uniform_positive"] = "near"
    source_task: int = -1  # task of the source run to start from; -1: the mean over its tasks
    source_member: int = 0  # member (seed) of the source run to start from
    # Before the input, after its first token, or before its end-of-sequence token.
    placement: Placement = "prefix"
    prompt_to_input: bool = True  # prompt positions attend to the input
    # Which prompt positions a prompt position attends to: ``all``, itself and earlier ones
    # (``causal``, the default of the original code), or only itself (``none``).
    prompt_to_prompt: PromptAttention = "all"
    input_to_prompt: bool = True  # input positions attend to the prompt

    def prompt_positions(self) -> int:
        return self.length + (self.task_length if self.combine == "concatenation" else 0)

    def task_prompt(self) -> PromptTuning:
        """Returns how the model uses the prompt of one task.

        Its last vectors are for the decoder.
        """
        length, in_decoder = self.prompt_positions(), self.decoder_length
        return replace(_joined_as(self), length=length, decoder_length=in_decoder)

    def config_errors(self) -> Iterator[str]:
        yield from super().config_errors()
        if self.decoder_length and self.combine == "concatenation":
            yield (
                f"method.decoder_length is {self.decoder_length}; must be 0 with "
                "method.combine=concatenation"
            )

    def shared_width(self, width: int) -> int:
        """Returns the number of features of the shared vectors, for a model of this width."""
        usual = {"features": width // 2, "projection": width}
        return (self.shared_features or usual[self.combine]) if self.combine in usual else width


@dataclass(frozen=True, kw_only=True)
class DescribedPrompts(MethodConfig):
    """All parameters of the model, which learns to use prompts that describe classes.

    The first ``positions * words`` tokens of every input describe classes and are not read as text.
    Each group of ``words`` tokens becomes one prompt vector: the embedding of a class's label, plus
    the mean embedding of words of the class, rotated by half the model's width to keep the two
    apart.  Positions without a label are masked.  The method adds no parameters: training yields a
    plain T5.
    """

    implementation = "prompt_tuning_jax.methods.described_prompts:PooledWords"
    lower_bounds: ClassVar[Mapping[str, float]] = {"positions": 1, "words": 1}
    trains_model = True
    mergeable = True

    positions: int = 8  # number of prompt vectors in front of every input
    words: int = 5  # tokens for each vector: the label, then words of the class

    def description_shape(self) -> tuple[int, int]:
        return (self.positions, self.words)

    def trains(self, name: str) -> bool:
        return True
