"""Parses a request into the rows to compute: checks it, tokenizes it, and makes jobs of it."""

import asyncio
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeAlias

from prompt_tuning_jax.config.serving import Mode
from prompt_tuning_jax.data.batching.tokenize import encode_inputs
from prompt_tuning_jax.data.images.files import decode_image
from prompt_tuning_jax.data.images.processing import processed
from prompt_tuning_jax.data.tasks.wording import AS_IT_IS, Given
from prompt_tuning_jax.data.vocabularies.class_vocabulary import ClassVocabulary
from prompt_tuning_jax.errors import UserError, nearest, suggest
from prompt_tuning_jax.serving.engine import Engine
from prompt_tuning_jax.serving.scheduler import Job
from prompt_tuning_jax.serving.schema import Limits, PredictRequest, RefusedError
from prompt_tuning_jax.serving.shapes import Row, Shapes
from prompt_tuning_jax.serving.tasks import PromptValidator, Served, ServedTask, Tasks
from prompt_tuning_jax.typing import HostArray

_NEAR = 1000  # tasks that are compared with a misspelled name
_LONGEST = 1_000_000  # characters of one input with its wording
_MODES_OF = {
    "labels": ("label",),
    "targets": ("score",),
    "max_length": ("generate",),
    "min_length": ("generate",),
    "repetition_penalty": ("generate",),
    "no_repeat_ngram_size": ("generate",),
    "normalize_length": ("label", "score"),
}
BARE = ServedTask(name="", prompts=())


@dataclass(frozen=True, kw_only=True)
class ParsedInput:
    """One tokenized input or image of a request, with its task, and the labels or target."""

    task: ServedTask
    ids: tuple[int, ...] | HostArray
    labels: tuple[str, ...] = ()
    targets: tuple[tuple[int, ...], ...] = ()
    limit: int = 0
    min_length: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    truncated: bool = False

    @property
    def prompts(self) -> tuple[Served | None, ...]:
        return self.task.prompts or (None,)


def too_many_rows(rows: int, limits: Limits) -> RefusedError:
    """Returns the error for a request that does not fit into the empty queue."""
    message = f"{rows} rows (inputs times prompts); this server queues {limits.waiting_rows}"
    return RefusedError(413, message, field="inputs")


class RequestParser:
    """Parses requests for these tasks and this engine."""

    def __init__(
        self, engine: Engine, tasks: Tasks, *, validator: PromptValidator, limits: Limits
    ) -> None:
        self._engine, self._tasks, self._limits = engine, tasks, limits
        self._encoded_labels = lru_cache(1024)(validator.label_ids_of)

    def parse_images(self, request: PredictRequest, images: Sequence[bytes]) -> list[ParsedInput]:
        """Returns one result per image file.

        ``request`` has their names as inputs, and their task.
        """
        words = self._engine.vocabulary
        if not isinstance(words, ClassVocabulary):
            raise RefusedError(422, "this model reads text; POST it to /v1/predict", field="image")
        self._check_number(len(images), field="image")
        task = self._task(request.task if isinstance(request.task, str) else "", 0, request)
        rows = len(images) * max(1, len(task.prompts))
        if rows > self._limits.waiting_rows:
            raise too_many_rows(rows, self._limits)
        labels, targets = task.labels, task.label_ids
        if task is BARE:
            labels, targets = words.labels, tuple((n,) for n in range(words.size))
        if not labels:
            message = "the bare model has no classifier; name a task"
            raise RefusedError(422, message, field="task")
        parsed = []
        for number, content in enumerate(images):
            try:
                image = decode_image(content, of=str(request.inputs[number])[:100])
                pixels_T = processed(image, words.images).reshape(-1)
            except UserError as error:
                raise RefusedError(422, str(error), field=f"image[{number}]") from None
            parsed.append(ParsedInput(task=task, ids=pixels_T, labels=labels, targets=targets))
        return parsed

    def _check_number(self, number: int, *, field: str) -> None:
        if number > self._limits.inputs:
            most = f"{number} inputs; at most {self._limits.inputs} fit in one request"
            raise RefusedError(413, most, field=field)

    def parse(self, request: PredictRequest) -> list[ParsedInput]:
        """Returns one result per input; RefusedError for the first invalid field."""
        inputs, options = request.inputs, request.options
        if self._engine.config.reads_images:
            message = "this model reads images; POST them as a form to /v1/predict/images"
            raise RefusedError(422, message, field="inputs")
        self._check_number(len(inputs), field="inputs")
        names = [request.task] * len(inputs) if isinstance(request.task, str) else request.task
        if len(names) != len(inputs):
            message = f"{len(names)} names, and {len(inputs)} in inputs; give one, or one for each"
            raise RefusedError(422, message, field="task")
        if request.mode not in self._engine.shapes.modes:
            raise RefusedError(
                422, f"this server was started without mode {request.mode}", field="mode"
            )
        for field, modes in _MODES_OF.items():
            if getattr(options, field) is not None and request.mode not in modes:
                message = f"is for mode {' or '.join(modes)}"
                raise RefusedError(422, message, field=f"options.{field}")
        if options.stream and request.mode != "generate":
            raise RefusedError(422, "is for mode generate", field="options.stream")
        tasks = [self._task(name, number, request) for number, name in enumerate(names)]
        rows = sum(max(1, len(task.prompts)) for task in tasks)
        if rows > self._limits.waiting_rows:
            raise too_many_rows(rows, self._limits)
        targets = self._targets(request)
        limit = self._limit(request)
        ids = [
            self._ids(self._worded(task, given, number, request), task, number, request)
            for number, (task, given) in enumerate(zip(tasks, inputs, strict=True))
        ]
        parsed = []
        for number, (task, (token_ids, truncated)) in enumerate(zip(tasks, ids, strict=True)):
            one = ParsedInput(
                task=task,
                ids=token_ids,
                limit=limit,
                min_length=options.min_length or 0,
                repetition_penalty=options.repetition_penalty or 1.0,
                no_repeat_ngram_size=options.no_repeat_ngram_size or 0,
                truncated=truncated,
            )
            if request.mode == "label":
                one = replace(one, labels=task.labels, targets=task.label_ids)
                if options.labels is not None:
                    labels = tuple(options.labels)
                    one = replace(one, labels=labels, targets=self._label_ids(labels))
                if not one.targets:
                    named = "the bare model has no labels"
                    if task.name:
                        named = f"task {task.name!r} has no labels of its own (.npy has none)"
                    message = f"{named}; give options.labels"
                    raise RefusedError(422, message, field="options.labels")
            elif request.mode == "score":
                one = replace(one, targets=(targets[number],))
            _check_method(one, number, request)
            parsed.append(one)
        if request.mode == "label":
            self._check_labels(parsed)
        return parsed

    def _check_labels(self, parsed: list[ParsedInput]) -> None:
        """Raises RefusedError if so many labels need more rows than the server queues."""
        shapes, most = self._engine.shapes, self._limits.waiting_rows
        pairs = sum(len(one.prompts) for one in parsed)
        rows, largest, at_once = 0, parsed[0], 1
        for one in parsed:
            number = shapes.targets_at_once(max(map(len, one.targets)))
            rows += len(one.prompts) * math.ceil(len(one.targets) / number)
            if len(one.targets) >= len(largest.targets):
                largest, at_once = one, number
        if rows > most:
            fit = max(1, most // pairs) * at_once
            raise RefusedError(
                413,
                f"{len(largest.labels)} labels for each of {pairs} inputs times prompts; send at "
                f"most {fit} labels or fewer inputs",
                field="options.labels",
            )

    def _task(self, name: str, number: int, request: PredictRequest) -> ServedTask:
        """Returns the task of this name; for ``TASK/PROMPT``, the task with this prompt only."""
        if name == "":
            return BARE
        field = "task" if isinstance(request.task, str) else f"task[{number}]"
        of, slash, member = name.partition("/")  # no name has one in it
        task = self._tasks.get(of)
        if task is None:
            near = nearest(of[:100], itertools.islice(self._tasks.everything(), _NEAR))
            meant = "" if near is None else f"did you mean {near!r}? "
            message = f"there is no task {of[:100]!r}; {meant}GET /v1/tasks names all"
            raise RefusedError(404, message, field=field)
        if not slash:
            return task
        alone = tuple(prompt for prompt in task.prompts if prompt.name == member)
        if not alone:
            there = suggest(member[:100], [prompt.name for prompt in task.prompts])
            message = f"task {of!r} has no prompt {member[:100]!r}; {there}"
            raise RefusedError(404, message, field=field)
        return replace(task, name=name, prompts=alone)

    def _label_ids(self, labels: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        try:
            return self._encoded_labels(labels)
        except UserError as error:
            raise RefusedError(422, str(error), field="options.labels") from None

    def _targets(self, request: PredictRequest) -> list[tuple[int, ...]]:
        if request.mode != "score":
            return []
        texts = request.options.targets or []
        if len(texts) != len(request.inputs):
            message = f"{len(texts)} targets for {len(request.inputs)} inputs; give one for each"
            raise RefusedError(422, message, field="options.targets")
        words = self._engine.vocabulary
        try:
            target_ids = [tuple(ids) for ids in words.encode_targets(texts)]
        except UserError as error:
            raise RefusedError(422, str(error), field="options.targets") from None
        longest = self._engine.shapes.longest_target
        for number, ids in enumerate(target_ids):
            if len(ids) > longest:
                message = f"{len(ids)} tokens; at most {longest} are scored"
                raise RefusedError(422, message, field=f"options.targets[{number}]")
        return target_ids

    def _limit(self, request: PredictRequest) -> int:
        most = self._engine.shapes.max_new_tokens
        max_length = request.options.max_length
        if max_length is not None and max_length > most:
            message = f"{max_length} tokens; this server generates at most {most}"
            raise RefusedError(422, message, field="options.max_length")
        limit = max_length or most
        if (request.options.min_length or 0) > limit:
            message = f"{request.options.min_length} tokens; at most {limit} are generated"
            raise RefusedError(422, message, field="options.min_length")
        return limit

    def _worded(self, task: ServedTask, given: Given, number: int, request: PredictRequest) -> str:
        """Returns the input with the task's wording, as in training."""
        wording = AS_IT_IS if request.options.raw else task.wording
        field = f"inputs[{number}]"
        if (length := wording.length_with(given)) > _LONGEST:
            message = f"{length:,} characters with the task's template; at most {_LONGEST:,}"
            raise RefusedError(413, message, field=field)
        try:
            return wording.apply(given)
        except UserError as error:
            raise RefusedError(422, str(error), field=field) from None

    def _ids(
        self, text: str, task: ServedTask, number: int, request: PredictRequest
    ) -> tuple[tuple[int, ...], bool]:
        """Returns the input's token ids, as in training, and whether they are cut."""
        words = self._engine.vocabulary
        wording = AS_IT_IS if request.options.raw else task.wording
        try:
            (ids,) = encode_inputs(words, [text], index=wording.index, chat=wording.chat)
        except UserError as error:
            raise RefusedError(422, str(error), field=f"inputs[{number}]") from None
        prompts = task.prompts or (None,)
        # A decoder-only model would go on from the prompt's last state, which is not held.
        if not ids and (self._engine.causal or any(p is None or not p.positions for p in prompts)):
            message = "the input is empty, and this model needs a token before its answer"
            raise RefusedError(422, message, field=f"inputs[{number}]")
        longest = self._engine.shapes.longest
        if len(ids) <= longest:
            return tuple(ids), False
        kept = words.num_kept_at_end(chat=wording.chat, ending=wording.ending)
        if request.options.truncate and longest > kept:
            return tuple(words.cut_input(ids, longest, kept_at_end=kept)), True
        message = f"{len(ids)} tokens; this server reads at most {longest} (options.truncate cuts)"
        raise RefusedError(422, message, field=f"inputs[{number}]")


def _check_method(one: ParsedInput, number: int, request: PredictRequest) -> None:
    """Raises RefusedError for what a method of the task cannot do.

    One that scores labels itself scores no other texts.
    """
    for prompt in one.prompts:
        spec = None if prompt is None else prompt.adapter_spec
        if request.mode == "generate" and spec is not None and spec.has_decoder_prompt:
            message = (
                f"task {one.task.name!r} has a prompt in the decoder: it generates no text here"
            )
            raise RefusedError(422, f"{message}; use predict, or mode label or score", field="mode")
        if prompt is None or not prompt.label_tokens:
            continue
        about = f"task {one.task.name!r} ({prompt.method}) ranks labels"
        if request.options.normalize_length:
            message = f"{about} itself, not by their tokens"
            raise RefusedError(422, message, field="options.normalize_length")
        if request.mode == "generate":
            raise RefusedError(422, f"{about} and generates no text; use mode label", field="mode")
        if not {*one.targets} <= {*prompt.label_tokens}:
            label = request.mode == "label"
            field = "options.labels" if label else f"options.targets[{number}]"
            message = f"{about} and was trained on these only: {', '.join(one.task.labels)}"
            raise RefusedError(422, message, field=field)


# The index of an input and the name of a prompt -> what is called with the text's ids so far.
OnIds: TypeAlias = Callable[[int, str], Callable[[list[int]], None]]


def jobs_of(
    mode: Mode,
    parsed: Sequence[ParsedInput],
    *,
    shapes: Shapes,
    apart: bool = False,
    on_ids: OnIds | None = None,
) -> list[list[Job]]:
    """Returns for each input a job for each prompt of its task.

    If there are many labels, several jobs share them.

    ``apart`` keeps tasks out of each other's batches.
    """
    owner = object()
    loop = asyncio.get_running_loop()
    jobs = []
    for index, one in enumerate(parsed):
        jobs_of_input = []
        for prompt in one.prompts:
            name = "" if prompt is None else prompt.name
            for targets in [()] if mode == "generate" else _in_parts(one.targets, shapes):
                row = Row(
                    ids=one.ids,
                    prompt=prompt,
                    targets=targets,
                    limit=one.limit,
                    min_length=one.min_length,
                    repetition_penalty=one.repetition_penalty,
                    no_repeat_ngram_size=one.no_repeat_ngram_size,
                )
                job = Job(
                    kind="generate" if mode == "generate" else "score",
                    row=row,
                    future=loop.create_future(),
                    owner=owner,
                    apart=one.task.name if apart else None,
                    on_ids=None if on_ids is None else on_ids(index, name),
                )
                jobs_of_input.append(job)
        jobs.append(jobs_of_input)
    return jobs


def _in_parts(
    targets: tuple[tuple[int, ...], ...], shapes: Shapes
) -> list[tuple[tuple[int, ...], ...]]:
    """Returns the targets in parts that fit the compiled shapes."""
    number = shapes.targets_at_once(max(map(len, targets)))
    return [targets[i : i + number] for i in range(0, len(targets), number)]
