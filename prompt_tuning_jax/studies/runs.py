"""Runs studies of several runs: a suite of tasks, or transfer from one task to others.

Each run has a folder, which also contains the run's scores in ``scores.json``, with
fingerprints of the data and the model, so an interrupted study resumes where it stopped.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prompt_tuning_jax.checkpoints import run_folder
from prompt_tuning_jax.checkpoints.run_folder import workdir_of
from prompt_tuning_jax.config.config_file import RUN_CONFIG
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.config.validation import validate
from prompt_tuning_jax.data.batching import task_data
from prompt_tuning_jax.data.batching.tokenize import check_labels
from prompt_tuning_jax.data.tasks.selection import build_mixture
from prompt_tuning_jax.data.tasks.t5_tasks.registry import name_in_form
from prompt_tuning_jax.data.tasks.task import Task
from prompt_tuning_jax.data.vocabularies.vocab import AnyVocabulary
from prompt_tuning_jax.distributed import processes
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.evaluation import evaluate
from prompt_tuning_jax.inference.prompt_sources import as_texts
from prompt_tuning_jax.inference.results import print_scores, scores_as_dict
from prompt_tuning_jax.inference.setup import build_model, model_fingerprint, vocabulary_of
from prompt_tuning_jax.storage import atomic_write
from prompt_tuning_jax.studies import suite as suites
from prompt_tuning_jax.studies import transfer
from prompt_tuning_jax.training.resume import claim, require_place, require_run
from prompt_tuning_jax.training.run import train
from prompt_tuning_jax.untrusted_input import read_json_file

SCORES = "scores.json"


@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    """The table as Markdown lines, all scores as JSON values, and the files that contain them.

    ``stopped_by`` is the number of the signal that stopped a run early, or 0.
    """

    lines: tuple[str, ...]
    scores: Mapping[str, Any]
    files: tuple[Path, ...]
    stopped_by: int


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One run and its evaluations.

    ``evaluations`` maps the name of each task to evaluate on to the experiment on that task,
    starting with the run's training task.
    """

    title: str
    experiment: Experiment
    evaluations: Mapping[str, Experiment]

    @property
    def folder(self) -> Path:
        return workdir_of(self.experiment)


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """The fingerprint and vocabulary of the frozen model, and the fingerprints of all data."""

    model: str
    vocabulary: AnyVocabulary
    data: Mapping[int, Mapping[str, Mapping[str, str]]]  # by run number and evaluation


def suite(
    experiment: Experiment,
    name: str,
    *,
    tasks: Sequence[str] = (),
    form: str = "taskless",
    split_validation: Sequence[str] = (),
    quiet: bool = False,
) -> SuiteResult:
    """Trains and evaluates every task of a suite, or those in ``tasks``, and returns the table.

    ``experiment`` applies to every task.  Each run has a folder in ``training.workdir``, where the
    table is also written as ``FORM_NAME.md`` and ``.json``.  The tasks in ``split_validation``
    train on one half of their validation split and are evaluated on the other.

    Raises UserError before any training if the options are invalid or a task's data is missing.
    With several processes, all of them must call it; only process 0 writes and prints.
    """
    validate(experiment)
    quiet = quiet or not processes.is_primary()
    tasks = as_texts(tasks, "tasks")
    split_validation = as_texts(split_validation, "split_validation")
    root = workdir_of(experiment)
    require_place(root)
    of = suites.get_suite(name)
    prefix = suites.require_form(form)
    chosen = suites.chosen_tasks(of, tasks, form=prefix)
    halved = (
        suites.chosen_tasks(of, split_validation, form=prefix, option="--split_validation")
        if split_validation
        else {}
    )
    if strange := [short for short in halved if short not in chosen]:
        raise UserError(f"--split_validation: {strange[0]} is not in --tasks; add it, or remove it")
    runs: dict[str, _Run] = {}
    missing: dict[str, list[str]] = {}
    for short, full in chosen.items():
        folder = root / (f"{full}_halves" if short in halved else full)
        on_task = suites.on_task(experiment, full, workdir=str(folder))
        if short in halved:
            try:
                on_task = _on_halves(on_task, full, root / "halves" / full)
            except UserError as error:
                missing.setdefault(str(error), []).append(short)
                continue
        runs[short] = _Run(title=short, experiment=on_task, evaluations={full: on_task})
    prepared = _prepare(list(runs.values()), missing)

    stem = name_in_form(name, prefix)
    files = (root / f"{stem}.md", root / f"{stem}.json")
    scores: dict[str, dict[str, Any]] = {}
    lines: list[str] = []
    stopped_by = 0
    for number, (short, run) in enumerate(runs.items()):
        suites.say(quiet, f"\n{chosen[short]}: {number + 1} of {len(runs)}")
        stopped_by, by_task = _scored(run, prepared, number, quiet=quiet)
        if stopped_by:
            suites.say(quiet, f"{len(scores)} of {len(runs)} tasks are done")
            break
        scores[short] = by_task[chosen[short]]
        lines = [*suites.table(of, scores), "", *suites.notes(of, run.experiment, scores, halved)]
        if processes.is_primary():
            _write_lines(files[0], [f"# {of.title} ({form})", "", *lines])
            run_folder.write_json(files[1], suites.as_json(of, scores, form=form))
    if not stopped_by:
        # Training has already printed the reports on the data, and the file contains them.
        shown = [line for line in lines if not line.startswith("- ")]
        suites.say(quiet, "", *shown, "", *(f"written: {file}" for file in files))
    return SuiteResult(
        lines=tuple(lines),
        scores=suites.as_json(of, scores, form=form),
        files=files if scores else (),
        stopped_by=stopped_by,
    )


def try_transfer(
    experiment: Experiment,
    source: str,
    targets: Sequence[str],
    *,
    methods: Sequence[str] = transfer.METHODS,
    model_tuning: Callable[[Experiment], Experiment] | None = None,
    form: str = "taskless",
    quiet: bool = False,
) -> SuiteResult:
    """Trains on a source task with each method and evaluates on the source and target tasks.

    Returns a table that compares the methods.  ``experiment`` describes prompt tuning;
    ``model_tuning`` modifies the experiment derived from it for model tuning.  Runs are in
    ``training.workdir``/SOURCE/METHOD, and the table is written as ``SOURCE_to_TARGETS.md`` and
    ``.json``.  Raises UserError like ``suite``.
    """
    validate(experiment)
    targets, methods = as_texts(targets, "targets"), as_texts(methods, "methods")
    root = workdir_of(experiment)
    require_place(root)
    known_form = suites.require_form(form)
    full = transfer.source_task(source, form=known_form)
    to = transfer.target_tasks(targets, source=full, form=known_form)
    trainable = transfer.as_model_tuning(experiment)
    trainable = validate(model_tuning(trainable)) if model_tuning else trainable
    planned = list(transfer.runs_of(experiment, full, to, methods=methods, model_tuning=trainable))
    runs = [
        _Run(
            title=str(Path(one.experiment.training.workdir).relative_to(root)),
            experiment=one.experiment,
            evaluations=one.evaluations,
        )
        for one in planned
    ]
    prepared = _prepare(runs, {})
    stem = f"{source}_to_{'_'.join(targets)}".replace("/", "_")
    files = (root / f"{stem}.md", root / f"{stem}.json")
    report = transfer.Report(source=full, targets=to, seeds=experiment.training.seeds)
    lines: list[str] = []
    stopped_by = 0
    for number, (one, run) in enumerate(zip(planned, runs, strict=True)):
        suites.say(quiet, f"\n{run.title}: {number + 1} of {len(runs)}")
        stopped_by, by_task = _scored(run, prepared, number, quiet=quiet)
        if stopped_by:
            suites.say(quiet, f"{number} of {len(runs)} runs are done")
            break
        report.add(one.method, by_task)
        lines = report.lines()
        if number + 1 < len(runs):
            lines.append(f"{number + 1} of {len(runs)} runs are done.")
        heading = f"# {transfer.short_of(full)} to {', '.join(targets)}"
        _write_lines(files[0], [heading, "", *lines, "", *(f"- {one}" for one in report.data)])
        run_folder.write_json(files[1], report.as_json())
    if not stopped_by:
        suites.say(quiet, "", *lines, "", *(f"written: {file}" for file in files))
    return SuiteResult(
        lines=tuple(lines),
        scores=report.as_json(),
        files=files if lines else (),
        stopped_by=stopped_by,
    )


def _prepare(runs: Sequence[_Run], missing: dict[str, list[str]]) -> _Prepared:
    """Checks all runs before any training.

    One UserError lists the problems with the data of all runs.
    ``missing`` maps the error messages already known to the tasks that they concern.
    """
    data: dict[int, dict[str, dict[str, str]]] = {}

    def complain(error: UserError, whose: str) -> None:
        missing.setdefault(str(error), []).append(whose)

    for number, run in enumerate(runs):
        for name, of in run.evaluations.items():
            try:
                validate(of)
                digests = suites.data_of(of, training=of is run.experiment)
                data.setdefault(number, {})[name] = digests
            except UserError as error:
                complain(error, name if len(run.evaluations) > 1 else run.title)
    _refuse(missing, "nothing was trained")
    for run in runs:
        if (run.folder / RUN_CONFIG).is_file():
            # With more steps, the scores kept in the folder would no longer be valid.
            require_run(run.folder, run.experiment, exactly=True)
    model = build_model(runs[0].experiment)
    words = vocabulary_of(model)
    for run in runs:
        for of in run.evaluations.values():
            for task in _evaluated(of):
                try:
                    check_labels(task, words, targets_length=of.data.targets_length)
                except UserError as error:
                    complain(error, run.title)
    _refuse(missing, "nothing was trained")
    prepared = _Prepared(model=model_fingerprint(model), vocabulary=words, data=data)
    for number, run in enumerate(runs):
        _kept(run, prepared, number)  # raises if the folder's run used other data or another model
    return prepared


def _refuse(config_errors: Mapping[str, Sequence[str]], what_now: str) -> None:
    if config_errors:
        each = [f"{', '.join(dict.fromkeys(w))}: {what}" for what, w in config_errors.items()]
        raise UserError(f"{what_now}:", *each)


def _evaluated(of: Experiment) -> tuple[Task, ...]:
    return build_mixture(of.data).evaluated_on(of.data.eval_split)


def _kept(run: _Run, prepared: _Prepared, number: int) -> dict[str, Any]:
    """Returns the scores in the run's folder by evaluation, except those on data that has changed.

    Raises UserError if the run used other training data or another model, or the file is
    unreadable.
    """
    file = run.folder / SCORES
    if not file.is_file() or not (run.folder / RUN_CONFIG).is_file():
        return {}
    try:
        kept = read_json_file(file)
        model, data, scores = kept["model"], kept["data"], kept["scores"]
        by_name = {name: (entry["of"], entry["scores"]) for name, entry in scores.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} cannot be read ({error!r}); remove it") from None
    present = prepared.data[number]
    train_data = next(iter(present.values()))
    remedy = f"use another --workdir, or remove {run.folder}"
    if model != prepared.model:
        raise UserError(f"{run.folder} contains a run on another frozen model; {remedy}")
    changed = [name for name in train_data if data.get(name) != train_data[name]]
    if changed:
        raise UserError(
            f"{run.folder} contains a run on other data: {', '.join(changed)} (or the code that "
            f"reads it) has changed since; {remedy}"
        )
    return {name: kept for name, (of, kept) in by_name.items() if of == present.get(name)}


def _scored(
    run: _Run, prepared: _Prepared, number: int, *, quiet: bool
) -> tuple[int, dict[str, Any]]:
    """Completes the run's training and evaluations.

    Returns the number of the signal that stopped it, or 0, and the scores by evaluation.
    """
    present = prepared.data[number]
    kept = _kept(run, prepared, number)
    # Also waits until every process has read the scores, because process 0 writes them below.
    processes.require_same(f"the list of scores in {run.folder / SCORES}", repr(sorted(kept)))
    if all(name in kept for name in run.evaluations):
        suites.say(quiet, f"{run.folder}: done; its scores are kept in {SCORES}")
        return 0, kept

    def keep() -> None:
        value = {
            "model": prepared.model,
            "data": next(iter(present.values())),
            "scores": {name: {"of": present[name], "scores": one} for name, one in kept.items()},
        }
        run_folder.write_json(run.folder / SCORES, value)

    def begin() -> None:
        claim(run.folder, run.experiment)
        keep()  # records data and model before training starts

    processes.primary_first(begin, "the claim of the folder")
    result = train(run.experiment, quiet=quiet)
    if result.stopped_by or not result.finished:
        return result.stopped_by, kept
    processes.barrier("the last prompt is written")
    for name, of in run.evaluations.items():
        if name in kept:
            continue
        scores = evaluate(of, prompts=[str(run.folder)])
        if not quiet:
            print_scores(scores)
        baseline = _baseline(run.experiment, of, prepared.vocabulary)
        kept[name] = suites.without_nan({**scores_as_dict(scores), **baseline})
        if processes.is_primary():
            keep()
    return 0, kept


def _baseline(trained: Experiment, of: Experiment, words: AnyVocabulary) -> dict[str, Any]:
    """Scores a constant prediction of the most frequent training target, and adds data reports."""
    data = task_data.build_data(trained, words)
    tried = data if of == trained else task_data.build_data(of, words, training=False)
    sets = list(tried.evaluation.values())
    majority: dict[str, float] = {}
    for name, examples in tried.evaluation.items():
        prefix = f"{name}/" if len(tried.evaluation) > 1 else ""
        scores = data.majority_scores(examples)
        majority |= {f"{prefix}{metric}": value for metric, value in scores.items()}
    return {
        "majority": majority,
        "labels": list(tried.labels),
        "train_examples": len(data.train_targets),
        "cut": 100 * sum(one.num_inputs_cut for one in sets) / sum(map(len, sets)),
        "reports": list(dict.fromkeys((*data.reports, *tried.reports))),
    }


def _on_halves(experiment: Experiment, name: str, folder: Path) -> Experiment:
    """Writes the halves of the validation split to two files; returns the experiment on them."""
    halves = suites.halves(name, experiment.data.data_dir)
    files = {half: folder / f"{half}.jsonl" for half in halves}

    def write() -> None:
        for half, examples in halves.items():
            rows = ({"inputs": e["inputs"], "targets": e["targets"]} for e in examples)
            _write_lines(files[half], [json.dumps(row) for row in rows])

    processes.primary_first(write, f"the halves of {name}")
    return suites.on_files(experiment, str(files["train"]), str(files["eval"]))


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    with atomic_write(path) as aside:
        aside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def with_seeds(experiment: Experiment, seeds: Sequence[int] = suites.SEEDS) -> Experiment:
    """Returns the experiment with ``seeds`` (by default five) if it has only one seed."""
    if len(experiment.training.seeds) > 1:
        return experiment
    return replace(experiment, training=replace(experiment.training, seeds=tuple(seeds)))
