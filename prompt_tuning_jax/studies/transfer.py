"""Zero-shot transfer from one task to others, with prompt tuning and with model tuning.

The table follows tables 1 and 2 of Lester et al. 2021: in-domain and out-of-domain scores with
their standard deviation over seeds, and prompt tuning's lead over model tuning.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prompt_tuning_jax.config.experiment import Experiment, Optimizer
from prompt_tuning_jax.data.tasks.registry import get_mixture
from prompt_tuning_jax.data.tasks.t5_tasks.registry import Form, form_of, name_in_form
from prompt_tuning_jax.data.tasks.t5_tasks.tables import T5_TASKS
from prompt_tuning_jax.errors import UserError, suggest
from prompt_tuning_jax.methods import FullTuning, method_name
from prompt_tuning_jax.studies.suite import SUITES, markdown_rows, on_task, score_names, without_nan

METHODS = ("prompt_tuning", "model_tuning")
GROUPS: Mapping[str, tuple[str, ...]] = {
    "mrqa": (
        "mrqa_textbook_qa_v100",
        "mrqa_bio_asq_v100",
        "mrqa_race_v100",
        "mrqa_relation_extraction_v100",
        "mrqa_duo_rc_v100",
        "mrqa_drop_v100",
    )
}
_TITLES = {"prompt_tuning": "prompt tuning", "model_tuning": "model tuning"}


@dataclass(frozen=True, kw_only=True)
class TransferRun:
    """One run on the source task, and its experiment on each evaluated task, source first."""

    method: str
    experiment: Experiment
    evaluations: Mapping[str, Experiment]


def source_task(name: str, *, form: Form, option: str = "--from") -> str:
    """Returns the full name of a task to train on from its short or full name.

    Raises UserError if the name is unknown or ambiguous, or the task has no training split.
    """
    full = _full_name(name, form=form, option=option)
    if not any("train" in task.splits for task in get_mixture(full).tasks):
        raise UserError(f"{option} {name}: {full} has no training split; choose another task")
    return full


def target_tasks(names: Sequence[str], *, source: str, form: Form) -> tuple[str, ...]:
    """Returns the full names of target tasks from short or full names.

    ``mrqa`` expands to its six out-of-domain sets.  If a variant of a target translates the
    source's labels into its own, that variant is chosen.  Raises UserError if a name is unknown or
    repeated, a task's labels differ from the source's, or no task is named.
    """
    targets: list[str] = []
    for name in names:
        for full in _targets(name, source=source, form=form):
            if full in targets:
                raise UserError(f"--to names {full} twice")
            _require_same_labels(source, full)
            targets.append(full)
    if not targets:
        raise UserError("--to is empty; name at least one task")
    return tuple(targets)


def runs_of(
    base: Experiment,
    source: str,
    targets: Sequence[str],
    *,
    methods: Sequence[str] = METHODS,
    model_tuning: Experiment | None = None,
) -> Iterator[TransferRun]:
    """Yields one run for all prompts, and one run per seed for model tuning.

    Each run has a folder in the workdir of ``base``.  ``model_tuning`` replaces the experiment
    that ``as_model_tuning`` derives from ``base``.  Raises UserError if a method is unknown, or if
    prompt tuning is requested and the method of ``base`` is not PromptTuning.
    """
    root = Path(base.training.workdir) / source
    for method in methods:
        if method not in METHODS:
            raise UserError(f"--methods: unknown {method!r}: {suggest(method, METHODS)}")
        if method == "prompt_tuning":
            if method_name(base.method) != method:
                raise UserError(
                    f"--methods prompt_tuning: the method of the config is "
                    f"{type(base.method).__name__}; use a config with PromptTuning"
                )
            of = [(base, root / method)]
        else:
            trainable = model_tuning or as_model_tuning(base)
            # Memory for one model and its optimizer state may not suffice for E of them.
            of = [
                (replace(trainable, training=replace(trainable.training, seeds=(seed,))), folder)
                for seed in base.training.seeds
                for folder in (root / method / f"seed_{seed}",)
            ]
        for experiment, folder in of:
            on = {t: on_task(experiment, t, workdir=str(folder)) for t in (source, *targets)}
            yield TransferRun(method=method, experiment=on[source], evaluations=on)


def as_model_tuning(base: Experiment) -> Experiment:
    """Returns ``base`` with all weights tuned, using T5's fine-tuning recipe.

    The recipe is that of Raffel et al. 2020, section 3.1.2.  Steps, batches and data stay the
    same.  Weights are float32, so that small updates are not lost to rounding.
    """
    return replace(
        base,
        model=replace(base.model, param_dtype="float32"),
        method=FullTuning(),
        optimizer=Optimizer(
            learning_rate=1e-3,
            multiply_by_parameter_scale=True,
            min_dim_size_to_factor=128,
            weight_decay=0.0,
        ),
        training=replace(base.training, learning_rates=(), inits=()),
    )


def summary(
    scores: Mapping[str, Mapping[str, Sequence[Mapping[str, float | None]]]],
) -> dict[str, Any]:
    """Converts {method: {task: scores per seed}} to {task: {metric: {method: mean and std}}}.

    The standard deviation is the sample standard deviation, or None for a single seed.  Each metric
    also has ``difference``, prompt tuning minus model tuning, or None if either is missing.
    """
    summarized: dict[str, Any] = {}
    for method, by_task in scores.items():
        for task, seeds in by_task.items():
            for metric in score_names(seeds[0]):
                values = [seed[metric] for seed in seeds]
                numbers = [value for value in values if value is not None]
                entry: dict[str, Any] = {"mean": None, "std": None, "seeds": len(values)}
                if len(numbers) == len(values):
                    std = statistics.stdev(numbers) if len(numbers) > 1 else None
                    entry |= {"mean": statistics.fmean(numbers), "std": std}
                summarized.setdefault(task, {}).setdefault(metric, {})[method] = entry
    for metrics in summarized.values():
        for by_method in metrics.values():
            means = [by_method.get(method, {}).get("mean") for method in METHODS]
            both = means[0] is not None and means[1] is not None
            by_method["difference"] = means[0] - means[1] if both else None
    return summarized


def table(
    summarized: Mapping[str, Any],
    *,
    source: str,
    methods: Sequence[str],
    majority: Mapping[str, Mapping[str, float | None]],
) -> list[str]:
    """Returns the table as Markdown, with a row per task and metric, the source first."""
    shown = [method for method in reversed(METHODS) if method in methods]
    heading = ["trained on", "evaluated on", "metric"]
    heading += ["majority"] if majority else []
    heading += [_TITLES[method] for method in shown]
    both = len(shown) == len(METHODS)
    rows = [heading + (["difference"] if both else [])]
    for task, metrics in summarized.items():
        for metric, by_method in metrics.items():
            row = [short_of(source), short_of(task), metric.split("/")[-1]]
            if "/" in metric:  # the task is evaluated on several sets
                row[1] = short_of(metric.rpartition("/")[0])
            row += [_number(majority.get(task, {}).get(metric))] if majority else []
            row += [_with_std(by_method.get(method)) for method in shown]
            difference = by_method["difference"]
            rows.append(row + ([_number(difference, sign="+")] if both else []))
    return markdown_rows(rows)


@dataclass(kw_only=True)
class Report:
    """Collects the results of finished runs; the keys of ``data`` are reports on the examples."""

    source: str
    targets: Sequence[str]
    seeds: Sequence[int]
    scores: dict[str, dict[str, list[dict[str, float | None]]]] = field(default_factory=dict)
    majority: dict[str, Mapping[str, float | None]] = field(default_factory=dict)
    data: dict[str, None] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)

    def add(self, method: str, by_task: Mapping[str, Mapping[str, Any]]) -> None:
        """Adds the evaluations of a run with one or more seeds."""
        for task, result in by_task.items():
            seeds = self.scores.setdefault(method, {}).setdefault(task, [])
            for scores in result["per_prompt"]:
                seeds.append({name: value for name, value in scores.items() if name != "prompt"})
            if result["labels"]:
                self.majority[task] = result["majority"]
            self.data |= dict.fromkeys(result["reports"])
            self.splits[task] = result["split"]

    def lines(self) -> list[str]:
        """Returns the table as Markdown lines, with notes that explain it."""
        rows = table(
            summary(self.scores),
            source=self.source,
            methods=list(self.scores),
            majority=self.majority,
        )
        seeds = ", ".join(map(str, self.seeds))
        return [
            *rows,
            "",
            f"Validation split, percent, mean ± standard deviation over seeds {seeds}.",
            *(
                f"{short_of(task)}: evaluated on its {split} split, because it has no other."
                for task, split in self.splits.items()
                if split != "validation"
            ),
        ]

    def as_json(self) -> dict[str, Any]:
        """Returns the table and the scores behind it as JSON values."""
        values = {
            "source": self.source,
            "targets": list(self.targets),
            "seeds": list(self.seeds),
            "summary": summary(self.scores),
            "majority": self.majority,
            "scores": self.scores,
        }
        finite: dict[str, Any] = without_nan(values)
        return finite


def short_of(name: str) -> str:
    """Returns the common name of a task: mrpc for ``taskless_glue_mrpc_from_qqp_v002``."""
    base = form_of(name)[1]
    for suite in SUITES.values():
        for short, full in suite.tasks.items():
            if full == base:
                return short
    task = T5_TASKS.get(base)
    return task.short if task else name


def _full_name(name: str, *, form: Form, option: str) -> str:
    """Returns a task's full name; UserError if ``name`` is unknown or in several benchmarks."""
    full_names = [
        name_in_form(task.name, form)
        for task in T5_TASKS.values()
        # Skip later versions, and variants made for one source task.
        if task.short == name and "_v200" not in task.name and "_from_" not in task.name
    ]
    of_suites = [s.tasks[name] for s in SUITES.values() if name in s.tasks]
    if of_suites and len(of_suites) == len({T5_TASKS[n].benchmark for n in _plain(full_names)}):
        full_names = [name_in_form(full, form) for full in of_suites]
    if len(full_names) > 1:
        raise UserError(
            f"{option} {name} is ambiguous: {' and '.join(full_names)}; give the full name"
        )
    return get_mixture(full_names[0] if full_names else name).name


def _plain(names: Sequence[str]) -> list[str]:
    return [form_of(name)[1] for name in names]


def _targets(name: str, *, source: str, form: Form) -> tuple[str, ...]:
    if name in GROUPS:
        return tuple(name_in_form(full, form) for full in GROUPS[name])
    source_form, base = form_of(source)
    translating = f"glue_{name}_from_{short_of(base)}_v002"
    if translating in T5_TASKS:
        return (name_in_form(translating, source_form),)
    return (_full_name(name, form=form, option="--to"),)


def _require_same_labels(source: str, target: str) -> None:
    source_labels, target_labels = (
        {task.labels for task in get_mixture(name).evaluated_on("validation")}
        for name in (source, target)
    )
    if set(map(frozenset, source_labels)) != set(map(frozenset, target_labels)):
        raise UserError(
            f"--to {target}: its labels are {_listed(target_labels)}, and those of {source} "
            f"are {_listed(source_labels)}; choose a task with the same labels"
        )


def _listed(sets: set[tuple[str, ...]]) -> str:
    return " and ".join(", ".join(labels) or "free text" for labels in sorted(sets))


def _number(value: float | None, *, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.1f}"


def _with_std(entry: Mapping[str, Any] | None) -> str:
    if entry is None or entry["mean"] is None:
        return "-"
    return _number(entry["mean"]) + (f" ± {entry['std']:.1f}" if entry["std"] is not None else "")
