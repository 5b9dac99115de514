"""What the configs of all methods have, and the checks that several of them share."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from prompt_tuning_jax.config.base import Config
from prompt_tuning_jax.config.text_template import parse_template
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.untrusted_input import compile_pattern

if TYPE_CHECKING:  # prompts are methods, too
    from prompt_tuning_jax.config.methods.prompts import PromptTuning

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
PromptAttention = Literal["all", "causal", "none"]
_MODEL = "model/"
CLASSIFIER = "model/classifier/"
_MAX_ALPHA = 1e30  # in float32 its product with anything stays finite
# The initialization of a trained prompt is its arrays; see MethodConfig.training_only.
INIT_ONLY = {"init": "uniform", "init_text": "", "init_path": "", "init_population": 0}


def split_init(entry: str) -> tuple[str, str]:
    """Splits an entry of ``training.inits``, INIT or ``file=PATH``, into its init and its path."""
    init, _, path = entry.partition("=")
    return init, path


def is_attached(name: str) -> bool:
    """Returns whether the parameter at this path of a ``TunedModel`` came with its method.

    The classifier of a model that reads images is made for the labels and trained by every method.
    """
    return name.startswith(("method/", CLASSIFIER)) or "/adapter/" in name


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
        """Returns whether the parameter at this path of a ``TunedModel`` is trainable."""
        return is_attached(name)

    def prompt_positions(self) -> int:
        """Returns the number of positions that the method adds to the input."""
        return 0

    def context_positions(self) -> int:
        """Returns the number of positions before a decoder-only model's input.

        They are those of a prompt or a prefix.
        """
        return self.prompt_positions()

    def uses_rng(self) -> bool:
        """Returns whether training draws random numbers for the method, as its dropout does."""
        return False

    def plain_prompt(self) -> "PromptTuning | None":
        """Returns how the model uses the prompts that a run saves.

        Returns None if these are not plain prompts.
        """
        return None

    def description_shape(self) -> tuple[int, int]:
        """Returns the positions at every input's start that are no text, and the tokens of each."""
        return (0, 0)

    def num_demonstrations(self) -> int:
        """Returns the number of examples in front of every input."""
        return 0

    def num_context_examples(self) -> int:
        """Returns the number of training examples that the method's parameters start from."""
        return 0

    def balances_labels(self) -> bool:
        """Returns whether the examples that the method takes have every label equally often."""
        return False

    def compose(self, demonstrations: Sequence[Mapping[str, str]], inputs: str) -> str:
        """Returns the text that the model reads for ``inputs``."""
        return inputs

    def without_label_init(self) -> Self:
        """Returns the config with an initialization that needs no labels of the data."""
        if getattr(self, "init", "") != "class_labels" or getattr(self, "init_labels", ()):
            return self
        return replace(self, init="sampled_vocabulary")  # type: ignore[call-arg]

    def config_errors(self) -> Iterator[str]:
        """Yields one message for each invalid field, which is called ``method.NAME``."""
        yield from self.bound_errors("method")

    def as_trained(self) -> Self:
        """Returns the config for the same arrays once they are trained.

        What training started from may no longer exist, and methods that differ only in it share a
        compiled program.
        """
        return replace(self, **self.training_only)


def template_errors(method: MethodConfig, **columns_of: Sequence[str]) -> Iterator[str]:
    """Yields one message for each template that does not name these columns once each.

    ``columns_of`` has the expected columns by field.
    """
    for name, expected in columns_of.items():
        columns = parse_template(getattr(method, name), field=f"method.{name}").columns
        if sorted(columns) != sorted(expected):
            listed = " and ".join(f"{{{column}}}" for column in expected)
            yield f"method.{name} is {getattr(method, name)!r}; it must name {listed}, once each"


def dropout_errors(dropout: float) -> Iterator[str]:
    """Yields one message if this is no probability of dropping."""
    if not 0 <= dropout < 1:
        yield f"method.dropout is {dropout}; must be at least 0 and below 1"


def is_selected(name: str, patterns: Sequence[str], *, of: str) -> bool:
    """Returns whether this path of a ``TunedModel`` is one of the model, and matches as such."""
    path = name.removeprefix(_MODEL)
    compiled = (compile_pattern(pattern, of=of) for pattern in patterns)
    return path != name and any(pattern.fullmatch(path) for pattern in compiled)


def alpha_errors(alpha: float, *, field: str = "alpha") -> Iterator[str]:
    """Yields one message if this scale of a low-rank update is not finite."""
    if not abs(alpha) < _MAX_ALPHA:
        yield f"method.{field} is {alpha}; must be below {_MAX_ALPHA:g}"


def pattern_errors(patterns: Sequence[str], *, field: str) -> Iterator[str]:
    """Yields one message for each of these that is not a regular expression."""
    for pattern in patterns:
        try:
            compile_pattern(pattern, of=field)
        except UserError as error:
            yield str(error)
