"""What is served: tasks by name, each with its labels and one prompt, method or ensemble."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import jax
import numpy as np
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.prompt_file import (
    PromptMetadata,
    check_fits,
    listed,
    load_prompt_with_metadata,
    shared_labels,
)
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.config.methods import PLACEMENTS
from prompt_tuning_jax.data.tasks.wording import AS_IT_IS, Wording, shared_wording, wording_of
from prompt_tuning_jax.data.vocabularies.class_vocabulary import ClassVocabulary
from prompt_tuning_jax.data.vocabularies.vocab import AnyVocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.loading_methods import known_with
from prompt_tuning_jax.inference.setup import added_positions
from prompt_tuning_jax.methods import TunedModel
from prompt_tuning_jax.methods.base import DECODER_PROMPT, LabelTokens
from prompt_tuning_jax.storage import natural_order
from prompt_tuning_jax.typing import DType, HostArray

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"


# Distinguishes everything that is served, so that a replacement is not taken for the old one.
_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True, eq=False)
class AdapterSpec:
    """Everything about an attached method except the numbers in its trained arrays.

    ``shapes`` and logical ``axes`` are those of the trained arrays, by path; all other parameters
    are the frozen model's.  ``prompt_positions`` is how many positions the method adds to the
    input.  ``label_tokens`` are the labels that the method scores itself, if it does.  Methods of
    equal specs share one object.
    """

    graphdef: nnx.GraphDef[TunedModel]
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    axes: Mapping[str, tuple[str | None, ...]]
    prompt_positions: int
    label_tokens: LabelTokens

    @property
    def bytes(self) -> int:
        """Size of one method's trained arrays."""
        return sum(one.size * one.dtype.itemsize for one in self.shapes.values())

    @property
    def has_decoder_prompt(self) -> bool:
        """Whether the decoder has a prompt, for which slots have no room."""
        return DECODER_PROMPT in self.shapes

    @property
    def generates(self) -> bool:
        """Whether the server generates text with it."""
        return not self.label_tokens and not self.has_decoder_prompt


class AdapterSpecs:
    """Makes each spec once, so that equal methods share their programs."""

    def __init__(self) -> None:
        self._known: dict[Any, AdapterSpec] = {}

    def of(self, attached: TunedModel, trainable: Mapping[str, HostArray]) -> AdapterSpec:
        """Returns the spec of an attached method whose arrays have these paths and shapes."""
        graphdef, _ = param_tree.split(attached)
        shapes = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in trainable.items()}
        key = graphdef, tuple((name, s.shape, s.dtype.name) for name, s in sorted(shapes.items()))
        if key not in self._known:
            axes = param_tree.logical_axes(attached)
            inside, before = added_positions(attached)
            self._known[key] = AdapterSpec(
                graphdef=graphdef,
                shapes=shapes,
                axes={name: axes[name] for name in shapes},
                # An encoder's prefixes are not in what it hands to the decoder.
                prompt_positions=inside + (before if attached.model.causal else 0),
                label_tokens=attached.method.label_tokens,
            )
        return self._known[key]


@dataclass(frozen=True, kw_only=True, eq=False)
class ServedPrompt:
    """One plain prompt ``[P, D]`` on the host.

    Equal numbers mean equal arrays: the tasks of a mixture share one prompt.
    """

    name: str
    prompt_PD: HostArray
    metadata: PromptMetadata
    placement: int = 0  # its index in PLACEMENTS
    number: int = field(default_factory=lambda: next(_numbers))
    method: ClassVar[str] = "prompt_tuning"  # however it was trained
    adapter_spec: ClassVar[None] = None
    label_tokens: ClassVar[LabelTokens] = ()

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return self.prompt_PD.size

    @property
    def length(self) -> int | None:
        """Its positions P."""
        return len(self.prompt_PD)

    @property
    def positions(self) -> int:
        """How many positions it adds to an input."""
        return len(self.prompt_PD)


@dataclass(frozen=True, kw_only=True, eq=False)
class ServedMethod:
    """The trained arrays of any other method on the host, by path.

    ``method`` is its name in a config.  Equal numbers mean equal arrays: the tasks of a mixture
    share one method.
    """

    name: str
    method: str
    trainable: Mapping[str, HostArray]
    adapter_spec: AdapterSpec
    metadata: PromptMetadata
    number: int = field(default_factory=lambda: next(_numbers))
    length: ClassVar[int | None] = None  # not a plain prompt

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return sum(array.size for array in self.trainable.values())

    @property
    def positions(self) -> int:
        """How many positions it adds to an input."""
        return self.adapter_spec.prompt_positions

    @property
    def label_tokens(self) -> LabelTokens:
        """The labels that it scores itself."""
        return self.adapter_spec.label_tokens


Served: TypeAlias = ServedPrompt | ServedMethod


@dataclass(frozen=True, kw_only=True, eq=False)
class ServedTask:
    """A name with one prompt or method, or with several that vote.

    ``label_ids`` include the end of sequence.  ``wording`` makes the model's input of a text, as in
    training.
    """

    name: str
    prompts: tuple[Served, ...]
    labels: tuple[str, ...] = ()
    label_ids: tuple[tuple[int, ...], ...] = ()
    wording: Wording = AS_IT_IS

    @property
    def method(self) -> str:
        """Its name in a config; several are separated by commas."""
        return ", ".join(dict.fromkeys(prompt.method for prompt in self.prompts))

    @property
    def normalize_length(self) -> bool:
        """Whether labels are ranked by the mean log-probability of their tokens, as in its run."""
        return any(prompt.metadata.normalize_length for prompt in self.prompts)


@dataclass(frozen=True, kw_only=True)
class PromptValidator:
    """Checks that prompts and labels fit this server's model."""

    embed_dim: int
    fingerprint: str
    dtype: DType
    vocabulary: AnyVocabulary
    longest: int | None = None  # None: any length
    longest_label: int = 64
    causal: bool = False
    peft_scale: float = 1.0  # ModelConfig.peft_prompt_scale

    def prompt(self, file: Path, *, name: str, run: Experiment | None = None) -> ServedPrompt:
        """Returns the prompt in a file or PEFT folder; UserError if it is damaged or does not fit.

        ``run`` fills what its metadata does not say.
        """
        prompt_PD, metadata = load_prompt_with_metadata(file, peft_scale=self.peft_scale)
        return self.checked(prompt_PD, known_with(run, metadata), name=name, of=file)

    def checked(
        self, prompt_PD: HostArray, metadata: PromptMetadata, *, name: str, of: Path
    ) -> ServedPrompt:
        """Returns the prompt of the file ``of``; UserError if it does not fit."""
        if isinstance(self.vocabulary, ClassVocabulary):
            raise UserError(
                f"{of} is a prompt without the classifier that was trained with it; serve the "
                "run's folder"
            )
        check_fits(
            prompt_PD, metadata, embed_dim=self.embed_dim, fingerprint=self.fingerprint, path=of
        )
        if self.longest is not None and len(prompt_PD) > self.longest:
            raise UserError(
                f"{of} has {len(prompt_PD)} positions, more than this server's {self.longest}; "
                "start it with a larger --max_prompt_length"
            )
        joining = metadata.combine or PLACEMENTS[0]
        if joining not in PLACEMENTS:
            raise UserError(f"{of}: combine is {joining!r}; known are {', '.join(PLACEMENTS)}")
        if self.causal and joining != PLACEMENTS[0]:
            raise UserError(
                f"{of}: combine is {joining!r}; with a decoder-only model only prompts before the "
                f"input ({PLACEMENTS[0]}) are served"
            )
        return ServedPrompt(
            name=name,
            prompt_PD=prompt_PD.astype(np.dtype(self.dtype)),
            metadata=metadata,
            placement=PLACEMENTS.index(joining),
        )

    def task(self, name: str, prompts: Sequence[Served], labels: Sequence[str] = ()) -> ServedTask:
        """Returns a task of these prompts.

        ``labels`` default to those that they were trained on.

        UserError if they were trained on different labels or with different wordings.
        """
        prompts = sorted(prompts, key=lambda prompt: natural_order(prompt.name))
        known = {prompt.name: prompt.metadata for prompt in prompts}
        try:
            wording = shared_wording(
                {
                    name: wording_of(one.task, one.inputs_template, chat=one.chat)
                    for name, one in known.items()
                }
            )
            task_labels = tuple(labels) or shared_labels(
                {name: one.labels for name, one in known.items()},
                instead="serve them as separate tasks",
            )
        except UserError as error:
            raise UserError(f"task {name}: {error}") from None
        if isinstance(self.vocabulary, ClassVocabulary):
            self._require_same_classes(name, known)
        return ServedTask(
            name=name,
            prompts=tuple(prompts),
            labels=task_labels,
            label_ids=self.label_ids(task_labels, field=f"labels of task {name}"),
            wording=wording,
        )

    def _require_same_classes(self, task: str, known: Mapping[str, PromptMetadata]) -> None:
        first, *others = known
        for other in others:
            if known[other].labels != known[first].labels:
                raise UserError(
                    f"task {task}: {first} has the classes {listed(known[first].labels)} and "
                    f"{other} {listed(known[other].labels)}; serve them as separate tasks"
                )

    def label_ids_of(self, labels: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """Returns the same for labels in a request."""
        return self.label_ids(labels, field="labels")

    def label_ids(self, labels: Sequence[str], *, field: str) -> tuple[tuple[int, ...], ...]:
        """Returns their tokens with the end of sequence.

        Raises UserError for empty, equal or too long labels.
        """
        if isinstance(self.vocabulary, ClassVocabulary):  # classes have the order of their labels
            return tuple((number,) for number in range(len(labels)))
        seen: dict[tuple[int, ...], str] = {}
        for label in labels:
            ids = tuple(self.vocabulary.encode_target(label))
            if len(ids) == 1:
                raise UserError(f"{field}: {label!r} has no tokens; labels must not be empty")
            if len(ids) > self.longest_label:
                raise UserError(
                    f"{field}: {label[:40]!r} has {len(ids)} tokens; the server scores at most "
                    f"{self.longest_label}"
                )
            if ids in seen:
                raise UserError(f"{field}: {seen[ids]!r} and {label!r} have the same tokens")
            seen[ids] = label
        return tuple(seen)


class Tasks:
    """The tasks by name; replaced as a whole, so that readers see all of a change or nothing."""

    def __init__(self, tasks: Mapping[str, ServedTask] | None = None) -> None:
        self._tasks: Mapping[str, ServedTask] = dict(tasks or {})

    def __len__(self) -> int:
        return len(self._tasks)

    def get(self, name: str) -> ServedTask | None:
        return self._tasks.get(name)

    def names(self) -> list[str]:
        return sorted(self._tasks, key=natural_order)

    def everything(self) -> Mapping[str, ServedTask]:
        return self._tasks

    def replace(self, tasks: Mapping[str, ServedTask]) -> None:
        self._tasks = dict(tasks)

    def put(self, task: ServedTask) -> None:
        self._tasks = {**self._tasks, task.name: task}

    def remove(self, name: str) -> None:
        self._tasks = {known: task for known, task in self._tasks.items() if known != name}


def check_name(name: str, *, field: str) -> str:
    """Returns the name; UserError unless it can be the name of a file in a folder."""
    if not re.fullmatch(NAME, name):
        raise UserError(
            f"{field} is {name[:100]!r}; a name starts with a letter or digit, followed by up to "
            "99 letters, digits, dots, dashes and underscores"
        )
    return name
