"""Answers requests: parses them, has their rows computed, and puts the results together."""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from typing import Any

from prompt_tuning_jax.analysis.words import token_text
from prompt_tuning_jax.config.serving import Mode
from prompt_tuning_jax.data.tasks.wording import Given
from prompt_tuning_jax.inference.ensemble import majority_vote
from prompt_tuning_jax.serving.compiling import CompilationStoppedError
from prompt_tuning_jax.serving.engine import Engine
from prompt_tuning_jax.serving.metrics import Metrics
from prompt_tuning_jax.serving.request_parser import (
    OnIds,
    ParsedInput,
    RequestParser,
    jobs_of,
    too_many_rows,
)
from prompt_tuning_jax.serving.scheduler import Job, QueueFullError, Scheduler, WorkerFailedError
from prompt_tuning_jax.serving.schema import (
    Limits,
    PredictRequest,
    PromptResult,
    RefusedError,
    Result,
)
from prompt_tuning_jax.serving.task_changes import TaskChanges
from prompt_tuning_jax.serving.task_store import TaskStore
from prompt_tuning_jax.serving.tasks import PromptValidator, ServedPrompt, ServedTask, Tasks

_log = logging.getLogger(__name__)
_COMPILED = 0.1  # seconds between two checks for newly compiled programs
_PATIENCE = 2.0  # seconds that a new program waits for an idle moment
_LONG = 20_000  # characters from which on a request is tokenized in a thread of its own
_FAILED = "the computation failed; other requests are not affected"
_DEADLINE = "the deadline has passed"


class Service:
    """Answers requests with one engine; ``state`` is starting, ready or draining.

    ``changes`` adds, replaces and removes tasks at run time, if the server was started for that.
    """

    def __init__(
        self,
        engine: Engine,
        tasks: Tasks,
        *,
        validator: PromptValidator,
        task_store: TaskStore | None = None,
        allow_changes: bool = False,
        limits: Limits | None = None,
        model_name: str = "",
        apart: bool = False,
    ) -> None:
        """Serves ``tasks``, and what other servers put into the ``task_store``.

        ``allow_changes`` lets this server change the store, too.  ``apart`` computes each task in
        separate batches, for comparison.
        """
        self.engine, self.tasks, self.validator = engine, tasks, validator
        self.limits = limits or Limits()
        self.model_name = model_name
        self.metrics = Metrics()
        self.metrics.tasks.set_function(lambda: len(self.tasks))
        self.metrics.cache_hits.set_function(lambda: self.engine.cache.hits)
        self.metrics.cache_misses.set_function(lambda: self.engine.cache.misses)
        self.on_compiled: Callable[[], None] = lambda: None  # once all programs are in use
        self.state = "starting"
        self.changes = TaskChanges(
            tasks,
            task_store,
            validator=validator,
            longest=engine.shapes.prompt_lengths[-1],
            allowed=allow_changes,
        )
        self._apart = apart
        self._background: list[asyncio.Task[None]] = []
        self._parser = RequestParser(engine, tasks, validator=validator, limits=self.limits)

    async def start(self, report: Callable[[str], None] = lambda name: None) -> None:
        """Compiles what every request can be answered with, then is ready; the rest follows."""
        self.scheduler = Scheduler(
            self.engine,
            self.metrics,
            max_wait=self.limits.wait_seconds,
            max_queue=self.limits.waiting_rows,
        )
        self.metrics.waiting.set_function(lambda: self.scheduler.waiting)
        if self.state != "draining":  # shut down before it has begun
            await self.scheduler.call(self.engine.compile_first, report)
        self.scheduler.start()
        self._background = [
            asyncio.create_task(self._measure()),
            asyncio.create_task(self.changes.follow()),
        ]
        if self.state == "starting":
            self.state = "ready"

    @property
    def is_ready(self) -> bool:
        """Whether requests are accepted."""
        return self.state == "ready" and self.scheduler.alive

    def drain(self) -> None:
        """Accepts no new requests; those accepted before are still answered."""
        self.state = "draining"
        self.engine.compiler.stop()

    async def close(self) -> None:
        """Drains, and returns once all accepted requests are answered."""
        self.drain()
        for task in self._background:
            task.cancel()
        await self.scheduler.close()

    async def _measure(self) -> None:
        """Puts newly compiled programs to use, in idle moments."""
        while self.engine.compiler.is_running:
            while await self._measure_next():
                pass
            await asyncio.sleep(_COMPILED)
        while await self._measure_next():
            pass
        progress = self.engine.compiler.progress
        if progress.made == progress.all:  # not if the server is told to end
            self.on_compiled()

    async def _measure_next(self) -> bool:
        """Measures a program that is not in use yet; returns whether there was one."""
        try:
            return await self.scheduler.call_when_idle(self.engine.measure, patience=_PATIENCE)
        except Exception as error:
            _log.exception("a program that failed when it was measured will not be used")
            await self.scheduler.repair(error)
            return True

    async def predict(self, request: PredictRequest, images: Sequence[bytes] = ()) -> list[Result]:
        """Returns one result for each input, or for each image file; or RefusedError."""
        if images:
            self._require_ready()
            parsed = await asyncio.to_thread(self._parser.parse_images, request, images)
        else:
            parsed = await self._parse(request)
        jobs = self._jobs(request, parsed)
        try:
            async with asyncio.timeout(self._seconds(request)):
                self._submit([job for group in jobs for job in group])
                values = [[await job.future for job in group] for group in jobs]
        except TimeoutError:
            raise RefusedError(504, _DEADLINE, field="options.deadline_ms") from None
        except WorkerFailedError:
            raise RefusedError(500, _FAILED) from None
        finally:
            self._give_up(jobs)
        return self._results(request, parsed, values)

    async def stream(self, request: PredictRequest) -> AsyncIterator[dict[str, Any]]:
        """Pieces of text as they are generated, then ``{"results": [...]}`` or ``{"error": ...}``.

        Raises RefusedError as long as nothing was generated.
        """
        parsed = await self._parse(request)
        pieces: asyncio.Queue[tuple[int, str, list[int]] | None] = asyncio.Queue()

        def on_ids(index: int, prompt: str) -> Callable[[list[int]], None]:
            return lambda ids: pieces.put_nowait((index, prompt, ids))

        jobs = self._jobs(request, parsed, on_ids)
        every = [job for group in jobs for job in group]
        self._submit(every)

        async def finished() -> None:
            await asyncio.wait([job.future for job in every], timeout=self._seconds(request))
            pieces.put_nowait(None)

        ending = asyncio.create_task(finished())
        sent: dict[tuple[int, str], str] = {}
        try:
            while (piece := await pieces.get()) is not None:
                index, prompt, ids = piece
                before = sent.get((index, prompt), "")
                # The last character may be incomplete.
                text = self.engine.vocabulary.decode(ids).rstrip("\ufffd")
                if text.startswith(before) and text != before:
                    sent[index, prompt] = text
                    yield {"index": index, "prompt": prompt, "text": text[len(before) :]}
            if not all(job.future.done() for job in every):
                if not sent:
                    raise RefusedError(504, _DEADLINE, field="options.deadline_ms")
                yield {"error": {"message": _DEADLINE}}
                return
            try:
                values = [[job.future.result() for job in group] for group in jobs]
            except WorkerFailedError:
                if not sent:
                    raise RefusedError(500, _FAILED) from None
                yield {"error": {"message": _FAILED}}
                return
            results = self._results(request, parsed, values)
            yield {"results": [one.model_dump(exclude_none=True) for one in results]}
        finally:
            ending.cancel()
            self._give_up(jobs)

    async def nearest_words(self, name: str) -> list[tuple[str, list[list[tuple[str, float]]]]]:
        """Returns for each prompt of a task and each of its positions, words and their cosines."""
        self._require_ready()
        task = self.tasks.get(name)
        if task is None:
            raise RefusedError(404, f"there is no task {name[:100]!r}", field="name")
        vocabulary = self.engine.vocabulary
        nearest = []
        prompts = [prompt for prompt in task.prompts if isinstance(prompt, ServedPrompt)]
        if not prompts:
            message = f"task {name!r} is {task.method}: it has no prompt to show words of"
            raise RefusedError(422, message, field="name")
        await self._require_made("nearest")
        for prompt in prompts:
            ids_PK, cosines_PK = await self.scheduler.call(self.engine.nearest_words, prompt)
            positions = [
                [
                    (token_text(vocabulary, int(i)), round(float(cosine), 4))
                    for i, cosine in zip(ids_K, cosines_K, strict=True)
                ]
                for ids_K, cosines_K in zip(ids_PK, cosines_PK, strict=True)
            ]
            nearest.append((prompt.name, positions))
        return nearest

    async def _require_made(self, key: Hashable) -> None:
        """Waits for a program that is compiled while requests are answered; asks for it first."""
        compiler = self.engine.compiler
        compiler.want(key)
        try:
            async with asyncio.timeout(self.limits.deadline_seconds):
                while not compiler.is_made(key):
                    await asyncio.sleep(_COMPILED)
        except (TimeoutError, CompilationStoppedError):
            message = "the program for this is not compiled yet"
            raise RefusedError(503, message, retry_after=10) from None

    def _require_ready(self) -> None:
        if not self.is_ready:
            state = self.state if self.state != "ready" else "out of order"
            raise RefusedError(503, f"the server is {state}", retry_after=1)

    async def _parse(self, request: PredictRequest) -> list[ParsedInput]:
        self._require_ready()
        options = request.options
        texts = (*request.inputs, *(options.targets or ()), *(options.labels or ()))
        if sum(map(_length, texts)) < _LONG:
            return self._parser.parse(request)
        return await asyncio.to_thread(self._parser.parse, request)

    def _jobs(
        self, request: PredictRequest, parsed: Sequence[ParsedInput], on_ids: OnIds | None = None
    ) -> list[list[Job]]:
        shapes = self.engine.shapes
        return jobs_of(request.mode, parsed, shapes=shapes, apart=self._apart, on_ids=on_ids)

    def _submit(self, jobs: Sequence[Job]) -> None:
        if len(jobs) > self.limits.waiting_rows:
            raise too_many_rows(len(jobs), self.limits)
        try:
            self.scheduler.submit(jobs)
        except QueueFullError as error:
            seconds = max(1, round(error.seconds))
            raise RefusedError(
                429, "too many rows are waiting", field="inputs", retry_after=seconds
            ) from None

    def _results(
        self, request: PredictRequest, parsed: Sequence[ParsedInput], values: list[list[Any]]
    ) -> list[Result]:
        decode = self.engine.vocabulary.decode
        normalize = request.options.normalize_length

        def mean(task: ServedTask) -> bool:
            return (
                normalize
                if normalize is not None
                else request.mode == "label" and task.normalize_length
            )

        results = [
            assembled(
                request.mode,
                task=one.task.name,
                prompts=[p.name if p is not None else "" for p in one.prompts],
                labels=one.labels,
                values=row_values,
                decode=decode,
                divisors=[len(ids) for ids in one.targets] if mean(one.task) else (),
            )
            for one, row_values in zip(parsed, values, strict=True)
        ]
        for result, one in zip(results, parsed, strict=True):
            result.truncated = one.truncated or None
        return results

    def _give_up(self, jobs: Sequence[Sequence[Job]]) -> None:
        """Cancels what is not computed yet: the client has gone."""
        every = [job for group in jobs for job in group]
        for job in every:
            # Reading the exception of a finished job keeps asyncio from logging it.
            if not job.future.cancel() and not job.future.cancelled():
                job.future.exception()
        if any(job.future.cancelled() for job in every):
            self.scheduler.drop_gone()

    def _seconds(self, request: PredictRequest) -> float:
        deadline_ms = request.options.deadline_ms
        most = self.limits.deadline_seconds
        return most if deadline_ms is None else min(most, deadline_ms / 1000)


def _length(given: Given) -> int:
    """About how many characters."""
    values = [given] if isinstance(given, str) else given.values()
    return sum(len(value) for value in values if isinstance(value, str))


def assembled(
    mode: Mode,
    *,
    task: str,
    prompts: Sequence[str],
    labels: Sequence[str],
    values: Sequence[Any],
    decode: Callable[[list[int]], str],
    divisors: Sequence[int] = (),
) -> Result:
    """Returns the result for one input.

    ``values`` are those of the first prompt, then of the second etc.

    Each is a list of log-probabilities (several lists may hold one prompt's labels) or a
    ``GeneratedRow``.  ``divisors``, if given, divide the log-probabilities of the labels or target.
    """
    each = len(values) // len(prompts)
    by_prompt = [values[i * each : (i + 1) * each] for i in range(len(prompts))]
    if mode == "score":
        scored = [
            PromptResult(prompt=name, log_prob=_divided([outputs[0][0]], divisors)[0])
            for name, outputs in zip(prompts, by_prompt, strict=True)
        ]
        mean = sum(one.log_prob or 0.0 for one in scored) / len(scored)
        return Result(task=task, log_prob=mean, prompts=scored)
    known: list[dict[str, float]] = []
    results: list[PromptResult] = []
    probabilities: dict[str, float] | None = None
    if mode == "label":
        for name, outputs in zip(prompts, by_prompt, strict=True):
            log_probs = _divided([one for part in outputs for one in part], divisors)
            known.append(dict(zip(labels, log_probs, strict=True)))
            share = softmax(log_probs)
            best = max(range(len(share)), key=log_probs.__getitem__)
            results.append(
                PromptResult(
                    prompt=name,
                    prediction=labels[best],
                    probabilities=dict(zip(labels, share, strict=True)),
                )
            )
        shares = [one.probabilities or {} for one in results]
        probabilities = {
            label: sum(share[label] for share in shares) / len(shares) for label in labels
        }
    else:
        for name, (generated,) in zip(prompts, by_prompt, strict=True):
            text = decode(generated.ids)
            log_prob = _finite(generated.log_prob)
            known.append({text: log_prob})
            tokens = len(generated.ids)
            results.append(
                PromptResult(prompt=name, prediction=text, log_prob=log_prob, tokens=tokens)
            )
    vote = majority_vote([one.prediction or "" for one in results], known)
    several = len(results) > 1
    return Result(
        task=task,
        prediction=vote.prediction,
        probabilities=probabilities,
        votes=dict(vote.votes) if several else None,
        agreement=vote.votes[vote.prediction] / len(results) if several else None,
        prompts=results,
    )


def softmax(log_probs: Sequence[float]) -> list[float]:
    """Shares that sum to one."""
    most = max(log_probs)
    weights = [math.exp(one - most) for one in log_probs]
    total = sum(weights)
    return [weight / total for weight in weights]


def _divided(log_probs: Sequence[float], divisors: Sequence[int]) -> list[float]:
    finite = map(_finite, log_probs)
    if not divisors:
        return list(finite)
    return [one / divisor for one, divisor in zip(finite, divisors, strict=True)]


def _finite(number: float) -> float:
    """JSON has no infinity: log-probabilities of -inf become the lowest float32."""
    return number if math.isfinite(number) else -3.4e38
