"""Serves prompts on one frozen model over HTTP."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING

from prompt_tuning_jax.config.config_file import run_config
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.config.serving import Serving
from prompt_tuning_jax.data.vocabularies.class_vocabulary import ClassVocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.setup import (
    build_model,
    model_fingerprint,
    partitioner_of,
    vocabulary_of,
)
from prompt_tuning_jax.models.base import Model

if TYPE_CHECKING:
    from fastapi import FastAPI

    from prompt_tuning_jax.serving.schema import Limits
    from prompt_tuning_jax.serving.service import Service
    from prompt_tuning_jax.serving.shapes import Shapes
    from prompt_tuning_jax.serving.task_store import TaskStore
    from prompt_tuning_jax.serving.tasks import PromptValidator, ServedTask

TOKEN, ADMIN_TOKEN = "PROMPT_TUNING_TOKEN", "PROMPT_TUNING_ADMIN_TOKEN"
_LIBRARIES = ("fastapi", "httptools", "prometheus_client", "uvicorn")
_LONGEST_UPLOAD = 100  # positions for prompts that clients add, unless a served one is longer


def default_experiment(prompts: str) -> Experiment:
    """Returns an experiment with the model of the run in this folder, or with the bundled model."""
    run = run_config(prompts) if Path(prompts).is_dir() else None
    model = Experiment().model if run is None else run.model
    return Experiment(model=model)


def serve(
    experiment: Experiment,
    prompts: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    serving: Serving | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT; UserError if the server cannot start.

    Programs may still be compiled when it returns, which ends only with the process.

    Tokens come from the environment: PROMPT_TUNING_TOKEN for predictions and
    PROMPT_TUNING_ADMIN_TOKEN for changes of the tasks.
    """
    _require_libraries()
    from prompt_tuning_jax.serving import server
    from prompt_tuning_jax.serving.middleware import checked_origin, checked_token

    serving = serving or Serving()
    token, admin_token = (
        checked_token(os.environ.get(name, ""), of=name) for name in (TOKEN, ADMIN_TOKEN)
    )
    for origin in serving.cors_origins:
        checked_origin(origin, of="--cors_origins")
    with server.bound(host, port) as listener:  # before any slow step
        print(f"opening {experiment.model.name_or_path} and {prompts}", file=sys.stderr, flush=True)
        service = open_service(
            experiment, prompts, serving=serving, allow_changes=bool(admin_token)
        )
        if host not in ("127.0.0.1", "::1", "localhost") and not token:
            print(
                f"note: {host} is open to other machines, and {TOKEN} is not set", file=sys.stderr
            )
        _answer(service, listener, serving, token=token, admin_token=admin_token)
    service.engine.compiler.wait_for_writes()


def _answer(
    service: "Service", listener: socket, serving: Serving, *, token: str, admin_token: str
) -> None:
    from prompt_tuning_jax.serving import server
    from prompt_tuning_jax.serving.app import make_app
    from prompt_tuning_jax.serving.connections import ConnectionLimits

    progress = service.engine.compiler.progress
    service.on_compiled = lambda: print(
        f"all {progress.all} programs are compiled", file=sys.stderr, flush=True
    )
    with _compiling(progress.first, beside=progress.all - progress.first) as report:

        def make(stop: Callable[[BaseException | None], None]) -> "FastAPI":
            def started(error: BaseException | None) -> None:
                if error is None:
                    report("")
                    tasks = f"{len(service.tasks):,} task{'s' * (len(service.tasks) != 1)}"
                    print(f"ready: {tasks} at {server.address_of(listener)}", flush=True)
                stop(error)

            return make_app(
                service,
                token=token,
                admin_token=admin_token,
                cors_origins=serving.cors_origins,
                report=report,
                on_started=started,
            )

        server.serve(
            make,
            listener,
            drain_seconds=service.limits.deadline_seconds,
            limits=ConnectionLimits(
                connections=serving.max_connections,
                per_client=serving.max_client_connections,
                keep_alive_seconds=serving.keep_alive,
            ),
            on_drain=lambda: _drain(service),
        )


def _drain(service: "Service") -> None:
    if service.state != "draining":
        waiting = service.scheduler.waiting if service.state == "ready" else 0
        rows = f"; answering {waiting} waiting rows first" if waiting else ""
        print(f"shutting down{rows}", file=sys.stderr, flush=True)
    service.drain()


def open_service(
    experiment: Experiment,
    prompts: str,
    *,
    serving: Serving,
    allow_changes: bool = False,
    apart: bool = False,
) -> "Service":
    """Loads the model and the prompts; nothing is compiled yet.

    ``allow_changes`` lets clients add and remove tasks; ``apart`` computes each task in separate
    batches.
    """
    from prompt_tuning_jax.serving.engine import Engine
    from prompt_tuning_jax.serving.loading import methods_of
    from prompt_tuning_jax.serving.service import Service
    from prompt_tuning_jax.serving.task_store import TaskStore
    from prompt_tuning_jax.serving.tasks import PromptValidator, Tasks

    folder = Path(prompts)
    if not folder.is_dir():
        what = "is a file; give its folder" if folder.exists() else "no such folder"
        raise UserError(f"--prompts {prompts}: {what}")
    partitioner = partitioner_of(experiment)
    model = build_model(experiment, partitioner=partitioner)
    words = vocabulary_of(model)
    validator = PromptValidator(
        embed_dim=model.config.embed_dim,
        fingerprint=model_fingerprint(model),
        dtype=model.dtype,
        vocabulary=words,
        longest=serving.max_prompt_length or None,
        longest_label=serving.max_new_tokens,
        causal=model.causal,
        peft_scale=model.config.peft_prompt_scale,
    )
    tasks = _tasks_in(folder, validator, model)
    store = TaskStore(folder)
    tasks = store.apply(tasks, validator)
    if allow_changes:
        _clear_away(store, folder)
    if not tasks and not allow_changes:
        raise UserError(
            f"--prompts {prompts}: there is no prompt; give a run's folder, a folder of prompts or "
            f"runs, or set {ADMIN_TOKEN} to add prompts later"
        )
    if isinstance(words, ClassVocabulary):
        shapes = _image_shapes(serving, tasks, words)
    else:
        shapes = _shapes(
            serving, tasks, window=model.config.max_positions, allow_changes=allow_changes
        )
    on_mesh = None if partitioner.is_single_device else partitioner
    engine = Engine(
        model,
        shapes=shapes,
        cache_rows=serving.cache_rows,
        partitioner=on_mesh,
        methods=methods_of([*tasks.values()]),
    )
    return Service(
        engine,
        Tasks(tasks),
        validator=validator,
        task_store=store,
        allow_changes=allow_changes,
        limits=_limits(serving),
        model_name=experiment.model.name_or_path,
        apart=apart,
    )


def _clear_away(store: "TaskStore", folder: Path) -> None:
    """Removes leftovers of a killed server; prints a note if the folder cannot be changed."""
    from prompt_tuning_jax.serving.task_store import CHANGES, BusyError, StorageError

    if not (folder / CHANGES).exists():
        if not os.access(folder, os.W_OK):
            print(f"note: {folder} is not writable: tasks cannot be changed", file=sys.stderr)
        return
    try:
        with store.changing():
            pass
    except StorageError as error:
        print(f"note: tasks in {folder} cannot be changed now: {error}", file=sys.stderr)
    except BusyError:
        print(f"note: another server is changing {folder}", file=sys.stderr)


def _tasks_in(folder: Path, validator: "PromptValidator", model: Model) -> "dict[str, ServedTask]":
    from prompt_tuning_jax.serving.loading import MethodLoader, find_tasks, load_tasks

    tasks: dict[str, ServedTask] = {}
    load_methods = MethodLoader(model, validator)
    for source in find_tasks(folder):
        file = source.files[0]
        run = run_config(str(file)) if file.is_file() else None
        for task in load_tasks(replace(source, run=run), validator, load_methods):
            if task.name in tasks:
                raise UserError(f"{file}: there is another task {task.name!r}; rename one")
            tasks[task.name] = task
    return tasks


def _shapes(
    serving: Serving,
    tasks: "dict[str, ServedTask]",
    *,
    window: int | None,
    allow_changes: bool,
) -> "Shapes":
    from prompt_tuning_jax.data.batching.window import inputs_limit
    from prompt_tuning_jax.serving.shapes import Shapes, prompt_lengths_of, targets_of

    every = [prompt for task in tasks.values() for prompt in task.prompts]
    known = [prompt.length for prompt in every if prompt.length is not None]
    # At least 1: the bare model is served with a prompt whose one position is masked.
    longest = serving.max_prompt_length or max([1, *known, *([_LONGEST_UPLOAD] * allow_changes)])
    limit = inputs_limit(
        window,
        inputs_length=max(serving.lengths, default=1),  # Shapes checks their order
        targets_length=serving.max_new_tokens,
        prompt_positions=max([longest, *(prompt.positions for prompt in every)]),
        advice="lower max_new_tokens (serving.max_new_tokens) or serve shorter prompts",
    )
    return Shapes(
        lengths=tuple(dict.fromkeys(min(length, limit) for length in serving.lengths)),
        batch_sizes=serving.batch_sizes,
        prompt_lengths=prompt_lengths_of(known, longest=longest),
        targets=targets_of(
            (task.label_ids for task in tasks.values()), longest=serving.max_new_tokens
        ),
        max_new_tokens=serving.max_new_tokens,
        slots=serving.slots,
        long_slots=serving.long_slots,
        modes=serving.modes,
    )


def _image_shapes(
    serving: Serving, tasks: "dict[str, ServedTask]", words: ClassVocabulary
) -> "Shapes":
    """Images have one size, and the classes of a row are scored at once."""
    from prompt_tuning_jax.serving.shapes import Shapes, Targets

    if "label" not in serving.modes:
        raise UserError("--modes: a model that reads images answers in mode label alone; add it")
    most = max([words.size, *(len(task.labels) for task in tasks.values())])
    return Shapes(
        lengths=(words.images.num_pixels,),
        batch_sizes=serving.batch_sizes,
        prompt_lengths=(1,),
        targets=(Targets(number=max(most, 1), length=1),),
        modes=("label",),
    )


def _limits(serving: Serving) -> "Limits":
    from prompt_tuning_jax.serving.schema import Limits

    return Limits(
        inputs=serving.max_inputs,
        waiting_rows=serving.max_queue,
        wait_seconds=serving.max_wait_ms / 1000,
        deadline_seconds=serving.deadline_seconds,
    )


def _require_libraries() -> None:
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"serve needs {', '.join(missing)}; run: pip install 'prompt_tuning_jax[serve]'"
        )


@contextmanager
def _compiling(number: int, *, beside: int) -> Iterator[Callable[[str], None]]:
    """Yields a function that advances a progress bar by one program; "" closes the bar."""
    print(
        f"compiling the {number} programs that answer all requests; {beside} faster ones follow "
        "while requests are answered",
        file=sys.stderr,
        flush=True,
    )
    if not sys.stderr.isatty():
        yield lambda name: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = ("compiling", BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    with bar:
        task = bar.add_task("", total=number)

        def report(name: str) -> None:
            bar.update(task, advance=bool(name), description=name)
            if not name:
                bar.stop()

        yield report
