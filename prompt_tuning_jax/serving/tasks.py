"""What is served: tasks by name, each with one prompt or an ensemble of them, and its labels."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np

from prompt_tuning_jax.checkpoints.prompt_file import (
    PromptMetadata,
    check_fits,
    load_prompt_with_metadata,
    shared_labels,
)
from prompt_tuning_jax.config.methods import PLACEMENTS
from prompt_tuning_jax.data.tasks.wording import AS_IT_IS, Wording, shared_wording, wording_of
from prompt_tuning_jax.data.vocabularies.vocab import AnyVocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.serving.adapter_spec import ServedMethod, numbers
from prompt_tuning_jax.typing import DType, HostArray

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"


@dataclass(frozen=True, kw_only=True, eq=False)
class ServedPrompt:
    """One prompt ``[P, D]`` on the host; no two have the same ``number``, replaced ones neither."""

    name: str
    prompt_PD: HostArray
    metadata: PromptMetadata
    placement: int = 0
    number: int = field(default_factory=lambda: next(numbers))
    method: ClassVar[str] = "prompt_tuning"  # however it was made

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return self.prompt_PD.size


Served: TypeAlias = ServedPrompt | ServedMethod


@dataclass(frozen=True, kw_only=True, eq=False)
class ServedTask:
    """A name with one prompt, or with several that vote; ``label_ids`` with their end.

    ``wording`` is what is put around a text, as in the prompts' training.  Among the prompts may
    be methods of other kinds.
    """

    name: str
    prompts: tuple[Served, ...]
    labels: tuple[str, ...] = ()
    label_ids: tuple[tuple[int, ...], ...] = ()
    wording: Wording = AS_IT_IS

    @property
    def method(self) -> str:
        """What a config calls it; of several kinds all."""
        return ", ".join(dict.fromkeys(prompt.method for prompt in self.prompts))


@dataclass(frozen=True, kw_only=True)
class PromptValidator:
    """What a prompt must be for this server's model."""

    embed_dim: int
    fingerprint: str
    dtype: DType
    vocabulary: AnyVocabulary
    longest: int | None = None  # None: any length
    longest_label: int = 64

    def prompt(self, file: Path, *, name: str, placement: str = "") -> ServedPrompt:
        """The prompt in a file or PEFT folder; UserError where it is damaged or does not fit.

        ``placement`` is the run's, for files that do not say it themselves.
        """
        prompt_PD, metadata = load_prompt_with_metadata(file)
        return self.checked(prompt_PD, metadata, name=name, placement=placement, of=file)

    def checked(
        self,
        prompt_PD: HostArray,
        metadata: PromptMetadata,
        *,
        name: str,
        placement: str = "",
        of: Path,
    ) -> ServedPrompt:
        """A prompt that was in the file ``of``; UserError where it does not fit."""
        check_fits(
            prompt_PD, metadata, embed_dim=self.embed_dim, fingerprint=self.fingerprint, path=of
        )
        if self.longest is not None and len(prompt_PD) > self.longest:
            raise UserError(
                f"{of} has {len(prompt_PD)} positions, and this server takes {self.longest} at "
                "most; start it with a larger --max_prompt_length"
            )
        joining = metadata.combine or placement or PLACEMENTS[0]
        if joining not in PLACEMENTS:
            raise UserError(f"{of}: combine is {joining!r}; known are {', '.join(PLACEMENTS)}")
        return ServedPrompt(
            name=name,
            prompt_PD=prompt_PD.astype(np.dtype(self.dtype)),
            metadata=metadata,
            placement=PLACEMENTS.index(joining),
        )

    def task(self, name: str, prompts: Sequence[Served], labels: Sequence[str] = ()) -> ServedTask:
        """A task of these prompts; its labels are what they were trained on unless given.

        UserError where they were trained on different labels, or with different wordings.
        """
        prompts = sorted(prompts, key=lambda prompt: natural(prompt.name))
        known = {prompt.name: prompt.metadata for prompt in prompts}
        try:
            wording = shared_wording(
                {name: wording_of(one.task, one.inputs_template) for name, one in known.items()}
            )
            own = tuple(labels) or shared_labels(
                {name: one.labels for name, one in known.items()},
                instead="serve them as tasks of their own",
            )
        except UserError as error:
            raise UserError(f"task {name}: {error}") from None
        return ServedTask(
            name=name,
            prompts=tuple(prompts),
            labels=own,
            label_ids=self.label_ids(own, field=f"labels of task {name}"),
            wording=wording,
        )

    def label_ids_of(self, labels: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """The same for labels of a request."""
        return self.label_ids(labels, field="labels")

    def label_ids(self, labels: Sequence[str], *, field: str) -> tuple[tuple[int, ...], ...]:
        """Their tokens with the end of sequence; UserError for empty, equal and long ones."""
        seen: dict[tuple[int, ...], str] = {}
        for label in labels:
            ids = (*self.vocabulary.encode(label), self.vocabulary.token_ids.eos)
            if len(ids) == 1:
                raise UserError(f"{field}: {label!r} has no tokens; give every label a text")
            if len(ids) > self.longest_label:
                raise UserError(
                    f"{field}: {label[:40]!r} has {len(ids)} tokens; at most {self.longest_label} "
                    "are scored"
                )
            if ids in seen:
                raise UserError(f"{field}: {seen[ids]!r} and {label!r} have the same tokens")
            seen[ids] = label
        return tuple(seen)


class Tasks:
    """The tasks by name; replaced as a whole, so that a reader sees all of a change or none."""

    def __init__(self, tasks: Mapping[str, ServedTask] | None = None) -> None:
        self._tasks: Mapping[str, ServedTask] = dict(tasks or {})

    def __len__(self) -> int:
        return len(self._tasks)

    def get(self, name: str) -> ServedTask | None:
        return self._tasks.get(name)

    def names(self) -> list[str]:
        return sorted(self._tasks, key=natural)

    def everything(self) -> Mapping[str, ServedTask]:
        return self._tasks

    def replace(self, tasks: Mapping[str, ServedTask]) -> None:
        self._tasks = dict(tasks)

    def put(self, task: ServedTask) -> None:
        self._tasks = {**self._tasks, task.name: task}

    def remove(self, name: str) -> None:
        self._tasks = {known: task for known, task in self._tasks.items() if known != name}


def check_name(name: str, *, field: str) -> str:
    """UserError for what could not be a file's name, or would leave its folder."""
    if not re.fullmatch(NAME, name):
        raise UserError(
            f"{field} is {name[:100]!r}; a name is a letter or digit, then up to 99 letters, "
            "digits, dots, dashes and underscores"
        )
    return name


def natural(name: str) -> list[Any]:
    """Sorts seed_2 before seed_10."""
    return [
        (not part.isdigit(), int(part) if part.isdigit() else 0, part)
        for part in re.split(r"(\d+)", name)
    ]
