"""The tuning methods as data: a dataclass of hyper-parameters for each, and their names.

A method's implementation is the ``TuningModule`` that ``implementation`` names.  It is imported
when the method is attached to a model (``methods.attach_method``).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, get_args

from prompt_tuning_jax.config.base import Config
from prompt_tuning_jax.config.field_syntax import first_match, parse_numbers
from prompt_tuning_jax.config.prompt_template import PromptTemplate, parse_prompt_template
from prompt_tuning_jax.config.text_template import parse_template
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.untrusted_input import compile_pattern

Init = Literal[
    "uniform",
    "uniform_positive",
    "xavier_uniform",
    "sampled_vocabulary",
    "class_labels",
    "described",
    "string",
    "file",
]
MultitaskInit = Literal[Init, "source"]
Combine = Literal["low_rank", "sum", "concatenation", "features", "projection"]
Placement = Literal["prefix", "after_first", "before_eos"]
PromptAttention = Literal["all", "causal", "none"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)

_MODEL = "model/"
_CLASSIFIER = "model/classifier/"
_MAX_RANK = 2**20  # larger than the width of any model
_MAX_ALPHA = 1e30  # in float32 its product with anything stays finite
# The initialization of a trained prompt is its arrays; see MethodConfig.training_only.
_INIT_ONLY = {"init": "uniform", "init_text": "", "init_path": "", "init_population": 0}


def split_init(entry: str) -> tuple[str, str]:
    """Splits an entry of ``training.inits``, INIT or ``file=PATH``, into its init and its path."""
    init, _, path = entry.partition("=")
    return init, path


def is_attached(name: str) -> bool:
    """Whether the parameter at this path of a ``TunedModel`` came with its method.

    The classifier of a model that reads images is made for the labels and trained by every method.
    """
    return name.startswith(("method/", _CLASSIFIER)) or "/adapter/" in name


@dataclass(frozen=True, kw_only=True)
class MethodConfig(Config):
    """Base of the methods' hyper-parameters.

    The docstring of a method states how many parameters it trains.
    """

    # "module:Class" of its TuningModule, or the class itself.
    implementation: ClassVar[str | type] = "prompt_tuning_jax.methods.base:TuningModule"
    # The fields of ``Optimizer`` whose values differ from those for prompt tuning.
    default_optimizer: ClassVar[Mapping[str, Any]] = {}
    # With fresh parameters, the model computes what it computes without them.
    identity_at_init: ClassVar[bool] = False
    # The method scores labels itself and generates no text.
    scores_labels: ClassVar[bool] = False
    # The loss is not that of the targets alone: of what the method scores, or of its context too.
    has_own_loss: ClassVar[bool] = False
    # A run trains something; False for baselines.
    is_trainable: ClassVar[bool] = True
    # The weights of the model itself are trainable, all of them.
    trains_model: ClassVar[bool] = False
    # The parameters have an axis of tasks.
    has_tasks: ClassVar[bool] = False
    # The method words the inputs itself, with ``compose``.
    composes_inputs: ClassVar[bool] = False
    # A run may save plain prompts, as files of prompts/.
    saves_prompts: ClassVar[bool] = False
    # The weights of a plain model can hold what the method trains.
    mergeable: ClassVar[bool] = False
    # The method also works on models that read images.
    for_images: ClassVar[bool] = False
    # Fields that matter only until the method is trained, and their values afterwards.
    training_only: ClassVar[Mapping[str, Any]] = {}

    def trains(self, name: str) -> bool:
        """Whether the parameter at this path of a ``TunedModel`` is trainable."""
        return is_attached(name)

    def prompt_positions(self) -> int:
        """The number of positions that the method adds to the input."""
        return 0

    def context_positions(self) -> int:
        """The number of positions before a decoder-only model's input: a prompt's or prefix's."""
        return self.prompt_positions()

    def uses_rng(self) -> bool:
        """Whether training draws random numbers for the method, as its dropout does."""
        return False

    def plain_prompt(self) -> "PromptTuning | None":
        """How the model uses the prompts that a run saves; None if these are not plain prompts."""
        return None

    def description_shape(self) -> tuple[int, int]:
        """The positions at the start of every input that are no text, and the tokens of each."""
        return (0, 0)

    def num_demonstrations(self) -> int:
        """The number of examples in front of every input."""
        return 0

    def num_context_examples(self) -> int:
        """The number of training examples that the method's parameters start from."""
        return 0

    def balances_labels(self) -> bool:
        """Whether the examples that the method takes have every label equally often."""
        return False

    def compose(self, demonstrations: Sequence[Mapping[str, str]], inputs: str) -> str:
        """The text that the model reads for ``inputs``."""
        return inputs

    def without_label_init(self) -> Self:
        """The config with an initialization that needs no labels of the data."""
        if getattr(self, "init", "") != "class_labels" or getattr(self, "init_labels", ()):
            return self
        return replace(self, init="sampled_vocabulary")  # type: ignore[call-arg]

    def config_errors(self) -> Iterator[str]:
        """One message for each invalid field, which is called ``method.NAME``."""
        yield from self.bound_errors("method")

    def as_trained(self) -> Self:
        """The config for the same arrays once they are trained.

        What training started from may no longer exist, and methods that differ only in it share a
        compiled program.
        """
        return replace(self, **self.training_only)


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
    training_only: ClassVar[Mapping[str, Any]] = {**_INIT_ONLY, "init_labels": (), "dropout": 0.0}

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
        yield from _dropout_errors(self.dropout)
        if not self.length and not self.decoder_length:
            yield "method.length is 0; must be at least 1, or set method.decoder_length"
        if not self.length and self.init == "file":
            yield "method.init=file is a prompt of the encoder, and method.length is 0"

    def plain_prompt(self) -> "PromptTuning | None":
        return None if self.decoder_length else _joined_as(self)


def _joined_as(method: "PromptTuning | MultitaskPrompts") -> PromptTuning:
    """Prompt tuning that joins a prompt to the input as ``method`` does."""
    return PromptTuning(
        placement=method.placement,
        prompt_to_input=method.prompt_to_input,
        prompt_to_prompt=method.prompt_to_prompt,
        input_to_prompt=method.input_to_prompt,
    )


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(MethodConfig):
    """``2 * length * H * K * L`` parameters, where L counts the layers of all chosen attentions.

    H is the number of heads of keys and values.  A decoder-only model has one attention per layer,
    ``decoder``.

    With ``hidden`` M above 0, an MLP over vectors of the model's width D computes the prefixes of
    each attention during training (Li and Liang 2021, section 4.3): ``length * D + (D + 1) * M +
    (M + 1) * 2 * L * H * K`` parameters, initialized like torch's layers.  A run saves only the
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
        """Whether a model's attentions of this name get prefixes; a name without a field does."""
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
    training_only: ClassVar[Mapping[str, Any]] = {**_INIT_ONLY, "frozen": 0}

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
class CPT(MethodConfig):
    """``(P - A) * D`` parameters: changes of the embeddings of P tokens, A of them of answers.

    Context-aware prompt tuning (Blau et al. 2024): a decoder-only model reads labelled examples
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
    # Factor on the loss of an answer in the context for each answer behind it.
    decay: float = 0.95

    def prompt_positions(self) -> int:
        """The most that there can be, because the number depends on the vocabulary."""
        return self.length

    def num_context_examples(self) -> int:
        return 0 if self.examples else self.shots

    def balances_labels(self) -> bool:
        return self.balance == "balanced"

    def plain_prompt(self) -> PromptTuning:
        return PromptTuning()

    def config_errors(self) -> Iterator[str]:
        yield from super().config_errors()
        yield from _template_errors(self, demonstration=["inputs", "targets"])
        if not 0 <= self.decay <= 1:
            yield f"method.decay is {self.decay}; must be from 0 to 1"
        if len(self.examples) % 2:
            yield (
                f"method.examples has {len(self.examples)} texts; it takes inputs and targets in "
                "turns"
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
        """The parsed ``template``; UserError if it is invalid."""
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
        yield from _dropout_errors(self.dropout)
        if self.dropout and self.encoder != "lstm":
            yield (
                f"method.dropout is {self.dropout} and method.encoder is {self.encoder}; only "
                "method.encoder=lstm has dropout"
            )
        self.parsed_template()


@dataclass(frozen=True, kw_only=True)
class ResidualPrompt(MethodConfig):
    """A prompt of P vectors, to which a network of them is added during training.

    Residual prompt tuning (Razdaibiedina et al. 2023) uses a bottleneck MLP of width M = ``hidden``
    with a layer norm behind it: ``P*D + (2*D + 1)*M + 3*D`` parameters if the positions share it,
    ``P*D + P*((2*D + 1)*M + 3*D)`` if each has its own, and 2*D fewer per MLP without the norm.  A
    run saves the sum, a plain prompt of ``PromptTuning``.
    """

    implementation = "prompt_tuning_jax.methods.residual_prompt:SkippedPrompt"
    saves_prompts = True
    default_optimizer: ClassVar[Mapping[str, Any]] = {"rates": ("method/mlp/.*=0.01",)}
    lower_bounds: ClassVar[Mapping[str, float]] = {"length": 1, "hidden": 1, "init_population": 0}
    training_only: ClassVar[Mapping[str, Any]] = {**_INIT_ONLY, "dropout": 0.0}

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
        yield from _dropout_errors(self.dropout)


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
    training_only: ClassVar[Mapping[str, Any]] = _INIT_ONLY

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
        yield from _alpha_errors(self.alpha)


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
    training_only: ClassVar[Mapping[str, Any]] = _INIT_ONLY

    length: int = 60  # number of prompt vectors
    hidden: int = 19  # width of the network's hidden layer
    init: Init = "sampled_vocabulary"  # initial values of the prompt, as for prompt tuning
    init_text: str = ""  # text for ``init=string``
    init_path: str = ""  # prompt file for ``init=file``
    init_population: int = 5000  # number of most common tokens to sample from; 0: all

    def prompt_positions(self) -> int:
        return self.length


@dataclass(frozen=True, kw_only=True)
class DeepPrompts(MethodConfig):
    """``(P_0 + P_1 + ...) * D`` parameters: P_i vectors for layer i of the encoder.

    The first layer's vectors are prepended to the input, as in prompt tuning.  Those of a later
    layer change the first P_i positions of its input.

    With ``hidden`` M above 0, one MLP over P_0 vectors computes the vectors of all L layers during
    training: ``P_0*D + (D + 1)*M + (M + 1)*L*D`` parameters.  A run saves only the output of the
    MLP.
    """

    implementation = "prompt_tuning_jax.methods.deep:LayerPrompts"
    for_images = True
    lower_bounds: ClassVar[Mapping[str, float]] = {"length": 1, "hidden": 0, "init_population": 0}
    training_only: ClassVar[Mapping[str, Any]] = {**_INIT_ONLY, "dropout": 0.0}

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
        yield from _dropout_errors(self.dropout)
        if self.lengths and not 0 < max(self.lengths) == self.lengths[0]:
            yield (
                f"method.lengths is {','.join(map(str, self.lengths))}; the first must be at least "
                "1, and none may be larger than the first"
            )
        if self.lengths and min(self.lengths) < 0:
            yield f"method.lengths has {min(self.lengths)}; must be at least 0"


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
    training_only: ClassVar[Mapping[str, Any]] = _INIT_ONLY

    length: int = 8  # number of trained vectors for each ``{prompt}`` of the template
    # Arrangement of trained vectors, anchor words and input, for instance ``{prompt:3} It is about
    # {prompt} {input}``; ``{prompt:3}`` has 3 vectors.
    template: str = "{prompt} {input}"
    init: Init = "sampled_vocabulary"  # initial values of the prompt, as for prompt tuning
    init_text: str = ""  # text for ``init=string``
    init_path: str = ""  # prompt file for ``init=file``
    init_population: int = 5000  # number of most common tokens to sample from; 0: all

    def parsed_template(self) -> PromptTemplate:
        """The parsed ``template``; UserError if it is invalid."""
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
        **_INIT_ONLY,
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
        """How the model uses the prompt of one task, whose last vectors are for the decoder."""
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
        """The number of features of the shared vectors, for a model of this width."""
        usual = {"features": width // 2, "projection": width}
        return (self.shared_features or usual[self.combine]) if self.combine in usual else width


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
    trains_model = True
    mergeable = True

    positions: int = 8  # number of prompt vectors in front of every input
    words: int = 5  # tokens for each vector: the label, then words of the class

    def description_shape(self) -> tuple[int, int]:
        return (self.positions, self.words)

    def trains(self, name: str) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class NoTuning(MethodConfig):
    """0 parameters: the frozen model alone, as a baseline."""

    for_images = True
    is_trainable = False
    identity_at_init = True

    def trains(self, name: str) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class PromptDesign(MethodConfig):
    """0 parameters: the frozen model reads an instruction and ``shots`` examples with answers.

    Each of ``training.seeds`` draws different examples from the training split; evaluation treats
    the seeds as members of an ensemble.  If an input is longer than ``data.inputs_length``, the
    examples drawn last are left out.  SentencePiece reads line breaks as spaces.
    ``evaluation.strategy`` decides whether labels are ranked or text is generated.
    """

    is_trainable = False
    composes_inputs = True
    identity_at_init = True
    lower_bounds: ClassVar[Mapping[str, float]] = {"shots": 0}

    instruction: str = ""  # text at the start of every input
    shots: int = 8  # number of examples in front of the input
    # Whether every label occurs equally often among the examples; without effect for tasks without
    # labels.
    balance: Literal["balanced", "as_drawn"] = "balanced"
    demonstration: str = "{inputs}\n{targets}"  # template of an example
    query: str = "{inputs}"  # template of the input
    separator: str = "\n\n"  # text between instruction, examples and input

    def trains(self, name: str) -> bool:
        return False

    def num_demonstrations(self) -> int:
        return self.shots

    def balances_labels(self) -> bool:
        return self.balance == "balanced"

    def compose(self, demonstrations: Sequence[Mapping[str, str]], inputs: str) -> str:
        demonstration = parse_template(self.demonstration, field="method.demonstration")
        query = parse_template(self.query, field="method.query")
        parts = [self.instruction] if self.instruction else []
        parts += [demonstration.render(example) for example in demonstrations]
        return self.separator.join([*parts, query.render({"inputs": inputs})])

    def config_errors(self) -> Iterator[str]:
        yield from super().config_errors()
        yield from _template_errors(self, demonstration=["inputs", "targets"], query=["inputs"])


@dataclass(frozen=True, kw_only=True)
class LoRA(MethodConfig):
    """``rank * (in + out)`` parameters per target: ``.../adapter/lora_a_DR`` and ``lora_b_RF``.

    With the defaults ``2 * rank * (D + H * K) * (encoder layers + 2 * decoder layers)``.

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
        """The rank of the update of one map."""
        return int(first_match(parse_numbers(self.ranks, field="method.ranks"), path, self.rank))

    def scale_of(self, path: str) -> float:
        """The factor on the product of one map's matrices."""
        alpha = first_match(parse_numbers(self.alphas, field="method.alphas"), path, self.alpha)
        rank = self.rank_of(path)
        return alpha / (rank**0.5 if self.rank_stabilized else rank)

    def uses_rng(self) -> bool:
        return self.dropout > 0

    def trains(self, name: str) -> bool:
        return is_attached(name) or _is_selected(name, self.parameters, of="method.parameters")

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
            yield from _alpha_errors(alpha, field=name)
        yield from _dropout_errors(self.dropout)
        if not self.targets and not self.embeddings:
            yield "method.targets is empty; give at least one regular expression"
        for name in ("targets", "embeddings", "copies", "parameters"):
            yield from _pattern_errors(getattr(self, name), field=f"method.{name}")


@dataclass(frozen=True, kw_only=True)
class IA3(MethodConfig):
    """One parameter for each output of ``outputs`` and for each input of ``inputs``.

    With the defaults ``2 * H * K * (encoder layers + 2 * decoder layers)`` on keys and values, and
    ``F * (encoder layers + decoder layers)`` on the input of the MLP's ``wo``.  They are called
    ``.../adapter/scale_F`` and ``.../adapter/scale_D``, and are initialized to ones.  Frozen
    weights may be quantized.
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
        yield from _pattern_errors(self.outputs, field="method.outputs")
        yield from _pattern_errors(self.inputs, field="method.inputs")


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

    BitFit trains biases.  T5 has no others than those of positions: ``D * (2 * encoder layers + 3 *
    decoder layers + 2)`` scales of norms and ``2 * H * buckets`` biases (of models with biases per
    layer ``H * buckets * (encoder layers + decoder layers)``), its only parameters that are not
    matrices.  For images, the pattern ``classifier/.*`` is a linear probe.
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
        selected = _is_selected(name, self.patterns, of="method.patterns")
        return selected or name.startswith(_CLASSIFIER)

    def config_errors(self) -> Iterator[str]:
        if not self.patterns:
            yield "method.patterns is empty; give at least one regular expression"
        yield from _pattern_errors(self.patterns, field="method.patterns")


# The name that a config file, ``--set method=NAME`` and gin use.
METHODS: dict[str, type[MethodConfig]] = {
    "prompt_tuning": PromptTuning,
    "prefix_tuning": PrefixTuning,
    "cartridge": Cartridge,
    "cpt": CPT,
    "p_tuning": PTuning,
    "residual_prompt": ResidualPrompt,
    "superpos_prompt": SuperPosPrompt,
    "dept": DePT,
    "adept": ADePT,
    "deep_prompts": DeepPrompts,
    "warp": WARP,
    "multitask_prompts": MultitaskPrompts,
    "full": FullTuning,
    "described_prompts": DescribedPrompts,
    "none": NoTuning,
    "prompt_design": PromptDesign,
    "lora": LoRA,
    "ia3": IA3,
    "adapters": Adapters,
    "pattern": PatternTuning,
}


def method_name(method: MethodConfig) -> str:
    """The name of a method in ``METHODS``."""
    return next(name for name, cls in METHODS.items() if cls is type(method))


def _template_errors(method: MethodConfig, **columns_of: Sequence[str]) -> Iterator[str]:
    """One message for each template, by its field, that does not name these columns once each."""
    for name, expected in columns_of.items():
        columns = parse_template(getattr(method, name), field=f"method.{name}").columns
        if sorted(columns) != sorted(expected):
            listed = " and ".join(f"{{{column}}}" for column in expected)
            yield f"method.{name} is {getattr(method, name)!r}; it must name {listed}, once each"


def _dropout_errors(dropout: float) -> Iterator[str]:
    if not 0 <= dropout < 1:
        yield f"method.dropout is {dropout}; must be at least 0 and below 1"


def _is_selected(name: str, patterns: Sequence[str], *, of: str) -> bool:
    """Whether this path of a ``TunedModel`` is one of the model, and matches as such."""
    path = name.removeprefix(_MODEL)
    compiled = (compile_pattern(pattern, of=of) for pattern in patterns)
    return path != name and any(pattern.fullmatch(path) for pattern in compiled)


def _alpha_errors(alpha: float, *, field: str = "alpha") -> Iterator[str]:
    if not abs(alpha) < _MAX_ALPHA:
        yield f"method.{field} is {alpha}; must be below {_MAX_ALPHA:g}"


def _pattern_errors(patterns: Sequence[str], *, field: str) -> Iterator[str]:
    for pattern in patterns:
        try:
            compile_pattern(pattern, of=field)
        except UserError as error:
            yield str(error)
