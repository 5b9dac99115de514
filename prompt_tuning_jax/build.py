"""Experiment -> model, data, method, optimizer, step: the only file that wires them together."""

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prompt_tuning_jax import optim, tree
from prompt_tuning_jax.checkpoints.fingerprint import fingerprint
from prompt_tuning_jax.checkpoints.load import load_model, random_model
from prompt_tuning_jax.data import demonstrations
from prompt_tuning_jax.data.buckets import FIXED, Buckets, parse_buckets
from prompt_tuning_jax.data.files import file_task
from prompt_tuning_jax.data.label_objective import NO_BLOCK, PromptBlock
from prompt_tuning_jax.data.loader import TrainBatches, eval_padding, eval_plan
from prompt_tuning_jax.data.metrics import get_metric
from prompt_tuning_jax.data.suggest import suggest
from prompt_tuning_jax.data.task import Mixture, Task, as_mixture, get_mixture
from prompt_tuning_jax.data.tokenize import TokenizedExamples, tokenize
from prompt_tuning_jax.data.vocab import AnyVocabulary
from prompt_tuning_jax.division import UNDIVIDED, Division
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.experiment import Data, Experiment
from prompt_tuning_jax.layout import Layout
from prompt_tuning_jax.methods import (
    Attached,
    Context,
    DescribedPrompts,
    Method,
    PromptDesign,
    mask_of,
)
from prompt_tuning_jax.models.quantization import is_quantized
from prompt_tuning_jax.models.t5 import T5
from prompt_tuning_jax.overrides import method_to_json
from prompt_tuning_jax.pretraining import TextData, open_text_data
from prompt_tuning_jax.sharding import RULES, make_mesh, parse_rules, with_rules
from prompt_tuning_jax.training.evaluate import (
    Predictions,
    Predictor,
    eval_batch_size,
    require_labels,
    score_members,
)
from prompt_tuning_jax.training.step import (
    Batch,
    TrainState,
    TrainStep,
    init_state,
    make_train_step,
)
from prompt_tuning_jax.typing import FlatParams, Mask

# Or the CPU backend lays all weights out anew before the loop over a batch's parts, and the logits'
# in float32: a twelfth of the time and two fifths of the memory of a step.
_OPTIONS_OF_PARTS = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
# Whose padding is counted for the report, or one epoch; whose shapes are compiled beforehand.
_REPORTED_STEPS = 200


@dataclass(frozen=True, kw_only=True)
class Members:
    """A method attached E times to one frozen model: one structure, E sets of tuned arrays.

    ``tasks`` are the names of those trained on where they are several.
    """

    graphdef: nnx.GraphDef[Attached]
    tuned: FlatParams  # each with a leading axis E
    frozen: FlatParams
    mask: Mask
    number: int
    tasks: tuple[str, ...] = ()

    def task_number(self, name: str) -> int | None:
        """Which of several tasks has this name; None where it is none of them."""
        return self.tasks.index(name) if name in self.tasks else None

    def sharded(self, layout: Layout, logical_axes: Mapping[str, Any]) -> "Members":
        """The same, laid out over the mesh; the tuned arrays' leading axis is ``ensemble``."""
        axes_E = {name: ("ensemble", *axes) for name, axes in logical_axes.items()}
        return dataclasses.replace(
            self,
            tuned=layout.shard(self.tuned, axes_E),
            frozen=layout.shard(self.frozen, logical_axes),
        )


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """Examples to train on (None where only evaluation is wanted) and to evaluate on, by task."""

    train: TrainBatches | None
    train_targets: tuple[str, ...]
    evaluation: Mapping[str, TokenizedExamples]
    labels: tuple[str, ...]
    best_by: str
    reports: tuple[str, ...]

    def one_of_each_shape(self, steps: int) -> list[Batch]:
        """An empty batch of each shape that the first steps of training have."""
        if self.train is None:
            return []
        return [*self.train.empty_batches(0, min(steps, _REPORTED_STEPS))]

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        if self.train is None:
            raise UserError("there is no training data; give data.task or data.train")
        return self.train.iterate(start, stop)


def build_model(experiment: Experiment, *, layout: Layout | None = None) -> T5:
    """The model that the experiment names, with its vocabulary, its weights on the mesh."""
    layout = layout_of(experiment) if layout is None else layout
    config = experiment.model
    kwargs: dict[str, Any] = {
        "dtype": config.dtype,
        "param_dtype": config.param_dtype,
        "dropout_rate": config.dropout_rate,
        "vocabulary": config.vocabulary,
        "quantization": config.quantization,
    }
    if config.random_weights:
        return random_model(config.name_or_path, seed=experiment.training.seeds[0], **kwargs)
    return load_model(config.name_or_path, mesh=layout.mesh, rules=layout.rules, **kwargs)


def model_fingerprint(model: T5) -> str:
    """Tells this frozen model from others."""
    return model.original_fingerprint or fingerprint(model.config, tree.split(model)[1])


def vocabulary_of(model: T5) -> AnyVocabulary:
    """The model's vocabulary; UserError where it came without."""
    if model.vocabulary is None:
        raise UserError("this model came without a vocabulary; set model.vocabulary to its file")
    words: AnyVocabulary = model.vocabulary
    return words


def build_mixture(data: Data) -> Mixture:
    """The task or mixture that the data fields name, or the one that a user's own files make."""
    if data.train or data.eval:
        return as_mixture(
            file_task(
                train=data.train,
                eval=data.eval,
                train_split=data.train_split,
                eval_split=data.eval_split,
                inputs_column=data.inputs_column,
                targets_column=data.targets_column,
                inputs_template=data.inputs_template,
                targets_template=data.targets_template,
                labels=data.labels,
                metrics=data.metrics,
            )
        )
    if data.module:
        _import_module(data.module)
    mixture = get_mixture(data.task)
    if not data.labels and not data.metrics:
        return mixture

    def changed(task: Task) -> Task:
        if data.labels and task.labels and not set(data.labels) & set(task.labels):
            raise UserError(
                f"data.labels is {', '.join(data.labels)} and the labels of {task.name} are "
                f"{', '.join(task.labels)}; leave data.labels empty for the task's own"
            )
        labels = data.labels or task.labels
        metrics = tuple(get_metric(name, labels=labels) for name in data.metrics) or task.metrics
        return dataclasses.replace(task, labels=labels, metrics=metrics)

    return dataclasses.replace(
        mixture,
        tasks=tuple(map(changed, mixture.tasks)),
        evaluated=tuple(map(changed, mixture.evaluated)),
    )


def labels_of(mixture: Mixture) -> tuple[str, ...]:
    """The labels of all its tasks."""
    members = (*mixture.tasks, *mixture.evaluated)
    return tuple(dict.fromkeys(label for task in members for label in task.labels))


def trained_tasks(data: Data) -> tuple[str, ...]:
    """The names of the tasks that are trained on together; none where it is one alone."""
    if data.train or data.eval or data.objectives or not data.task:
        return ()
    names = tuple(task.name for task in build_mixture(data).tasks)
    return names if len(names) > 1 else ()


def build_data(
    experiment: Experiment,
    vocabulary: AnyVocabulary,
    *,
    split: str | None = None,
    training: bool = True,
    layout: Layout | None = None,
) -> TaskData | TextData:
    """The examples of the experiment; ``split`` replaces ``data.eval_split``.

    With a ``layout`` over several processes training batches have the rows of this one alone.
    """
    data = experiment.data
    if data.objectives:
        method = experiment.method
        block = NO_BLOCK
        if isinstance(method, DescribedPrompts):
            block = PromptBlock(positions=method.positions, words=method.words)
        return open_text_data(
            data,
            vocabulary,
            batch_size=experiment.training.batch_size,
            seeds=experiment.training.seeds,
            block=block,
        )
    if data.train and not data.eval and (split or data.eval_split) != data.train_split:
        raise UserError("data.eval is empty; name a file of examples to evaluate on (--eval_data)")
    mixture = build_mixture(data)

    def examples(tasks: Sequence[Task], split: str) -> list[TokenizedExamples]:
        return [
            tokenize(
                task,
                split,
                vocabulary,
                inputs_length=data.inputs_length,
                targets_length=data.targets_length,
                data_dir=data.data_dir,
                use_cache=data.cache,
            )
            for task in tasks
        ]

    eval_split = split or data.eval_split
    evaluated = tuple(
        designed(experiment, task, vocabulary) for task in mixture.evaluated_on(eval_split)
    )
    train_sets = examples(mixture.tasks, data.train_split) if training else []
    eval_sets = [one.at_most(data.max_eval_examples) for one in examples(evaluated, eval_split)]
    evaluation = {one.task.name: one for one in eval_sets}
    labels = labels_of(mixture)
    if experiment.evaluation.strategy == "rank":
        for task in evaluated:  # now, and not at the first evaluation
            require_labels(task.labels)
    train_targets = tuple(e["targets"] for one in train_sets for e in one.texts)
    if experiment.method.ranks:
        for target in set(train_targets) - set(labels):
            raise UserError(
                f"{type(experiment.method).__name__} chooses among the labels, and the target "
                f"{target[:40]!r} is none of them; name all in data.labels"
            )
    train = None
    if train_sets:
        train = TrainBatches(
            train_sets,
            batch_size=experiment.training.batch_size,
            seeds=experiment.training.seeds,
            rates=mixture.rates if len(mixture.rates) > 1 else (),
            buckets=buckets_of(experiment),
            rows=slice(None) if layout is None else layout.rows(experiment.training.batch_size),
        )
    return TaskData(
        train=train,
        train_targets=train_targets,
        evaluation=evaluation,
        labels=labels,
        best_by=_best_by(experiment.evaluation.best_by, eval_sets),
        reports=tuple(_reports(experiment, train_sets, train, eval_sets, layout)),
    )


def designed(
    experiment: Experiment, task: Task, vocabulary: AnyVocabulary, *, source: Task | None = None
) -> Task:
    """The task as the method words its inputs, which most methods leave as they are.

    Demonstrations are drawn from the training split of ``source``, the task's own unless given, by
    the first seed.
    """
    method, data = experiment.method, experiment.data
    if not isinstance(method, PromptDesign):
        return task
    source = source or task
    drawn: demonstrations.Demonstrations = ()
    if method.shots:
        if data.train_split not in source.splits:
            raise UserError(
                f"method=prompt_design takes demonstrations from the split {data.train_split!r}, "
                f"and task {source.name!r} has none; name a file in data.train, or set "
                "method.shots=0"
            )
        drawn = demonstrations.draw(
            list(source.load(data.train_split, data.data_dir)),
            labels=source.labels,
            shots=method.shots,
            balanced=method.balance == "balanced",
            seed=experiment.training.seeds[0],
        )
    return demonstrations.demonstrated(
        task,
        drawn,
        compose=method.compose,
        identity=method_to_json(method),
        vocabulary=vocabulary,
        inputs_length=data.inputs_length,
    )


def draws_of(experiment: Experiment) -> tuple[Experiment, ...]:
    """The experiment once for each of its seeds where these decide the inputs, else alone."""
    if not isinstance(experiment.method, PromptDesign) or not experiment.method.shots:
        return (experiment,)
    training = experiment.training
    return tuple(
        dataclasses.replace(experiment, training=dataclasses.replace(training, seeds=(seed,)))
        for seed in training.seeds
    )


def buckets_of(experiment: Experiment) -> Buckets:
    """How the lengths of batches are chosen; fixed for the methods that ask for it."""
    method = experiment.method
    if isinstance(method, DescribedPrompts):  # descriptions stand in the inputs, at their places
        return FIXED
    return parse_buckets(experiment.data.buckets, beside=method.added_length())


def attach_members(
    experiment: Experiment, model: T5, *, labels: tuple[str, ...], layout: Layout | None = None
) -> Members:
    """The method attached once per seed, each from its own seed (and init), on the mesh."""
    layout = layout_of(experiment) if layout is None else layout
    members, logical_axes = attach_unplaced(experiment, model, labels=labels)
    return members.sharded(layout, logical_axes)


def attach_unplaced(
    experiment: Experiment, model: T5, *, labels: tuple[str, ...]
) -> tuple[Members, dict[str, tuple[str | None, ...]]]:
    """The same before anything is laid out, and the logical axes of every parameter."""
    seeds, inits = experiment.training.seeds, experiment.training.inits
    tasks = trained_tasks(experiment.data)
    context = Context(labels=labels, vocabulary=model.vocabulary, tasks=max(len(tasks), 1))
    tuned: list[dict[str, Any]] = []
    for number, seed in enumerate(seeds):
        method: Any = experiment.method
        if inits:
            method = dataclasses.replace(method, init=inits[number])
        # Not the key of dropout: that one is folded with steps from 0.
        key = jax.random.fold_in(jax.random.key(seed), 0x9E3779B9)
        attached: Attached = method.attach(model, key=key, context=context)
        # Members may differ in how they start, not in what they are.
        graphdef, params = tree.split(with_config(attached, experiment.method))
        mask = mask_of(experiment.method, list(params))
        own, frozen = tree.partition(params, mask)
        require_trainable(own)
        tuned.append(own)
    members = Members(
        graphdef=graphdef,
        tuned={name: jnp.stack([own[name] for own in tuned]) for name in tuned[0]},
        frozen=frozen,
        mask=mask,
        number=len(seeds),
        tasks=tasks,
    )
    axes = tree.logical_axes(attached)
    used = {axis for own in axes.values() for axis in own if axis is not None}
    for axis in parse_rules(experiment.mesh.rules):
        if axis not in RULES and axis not in used:
            raise UserError(f"mesh.rules: no array has the axis {axis!r}: {suggest(axis, RULES)}")
    return members, axes


def require_trainable(tuned: Mapping[str, Any]) -> None:
    """Raises UserError where a method would train weights that are quantised."""
    if is_quantized(tuned):
        raise UserError(
            "this method trains the model's weights, and they are quantised; "
            "set model.quantization=none"
        )


def layout_of(experiment: Experiment, *, devices: Sequence[jax.Device] | None = None) -> Layout:
    """The mesh over these devices or all, of all processes, and the rules.

    UserError where it does not fit.  One device needs no mesh, whatever the experiment says.
    """
    config = dataclasses.asdict(experiment.mesh)
    rules = with_rules(config.pop("rules"))
    return Layout(mesh=make_mesh(**config, devices=devices), rules=rules)


def train_layout(experiment: Experiment, *, devices: Sequence[jax.Device] | None = None) -> Layout:
    """As ``layout_of``; UserError where the training batch cannot be divided over the mesh."""
    layout = layout_of(experiment, devices=devices)
    rows = experiment.training.batch_size // max(experiment.training.gradient_accumulation, 1)
    if rows % layout.batch_parts:
        raise UserError(
            f"training.batch_size {experiment.training.batch_size} cannot be divided over "
            f"{layout.batch_parts} devices (mesh data x fsdp, with gradient accumulation "
            f"{experiment.training.gradient_accumulation}); change one of them"
        )
    return layout


def placed_batches(
    data: TaskData | TextData, layout: Layout, start: int, stop: int
) -> Iterator[Batch]:
    """The batches ``[E, B, ...]`` of steps start to stop - 1, with B divided over the mesh."""
    axes = ("ensemble", "batch", "length")
    for batch in data.batches(start, stop):
        if layout.is_trivial:
            yield batch
        elif isinstance(data, TextData):
            yield layout.place_batch(batch, axes)
        else:
            assert data.train is not None
            size = data.train.batch_size
            rows = layout.rows(size)
            yield {
                name: layout.place_rows(
                    np.asarray(local), axes[: local.ndim], rows=rows, batch_size=size
                )
                for name, local in batch.items()
            }


def with_config(attached: Attached, method: Method) -> Attached:
    """The same module described by ``method``, so that members have one structure."""
    if hasattr(attached.method, "config"):
        attached.method.config = method
    return attached


def division_of(experiment: Experiment, members: Members, layout: Layout) -> Division:
    """What a step computes one after another, by ``training.gradient_accumulation``."""
    asked = experiment.training.gradient_accumulation
    if asked:
        return Division(parts=asked)
    few_train = tree.count(members.tuned) < tree.count(members.frozen)
    if not _on_cpu(layout) or not layout.is_trivial or not few_train:
        return UNDIVIDED
    own = {name: array[0] for name, array in members.tuned.items()}
    config = tree.merge(members.graphdef, {**members.frozen, **own}).model.config
    return Division(config=config, added_length=experiment.method.added_length())


def _on_cpu(layout: Layout) -> bool:
    return all(device.platform == "cpu" for device in layout.mesh.devices.flat)


def build_step(
    experiment: Experiment, members: Members
) -> tuple[TrainState, TrainStep, Callable[[int], np.ndarray]]:
    """The state before the first step, the jitted step, and step -> learning rates ``[E]``."""
    layout = layout_of(experiment)
    training, config = experiment.training, experiment.optimizer
    state = init_state(members.tuned, optim.make_optimizer(config, members.mask), layout=layout)
    schedule = optim.make_schedule(config, total_steps=training.steps)

    def learning_rates(at: int) -> np.ndarray:
        return np.asarray(_rates(experiment), np.float32) * float(schedule(jnp.asarray(at)))

    return state, step_from(experiment, members, state, layout=layout), learning_rates


def step_from(
    experiment: Experiment, members: Members, state: TrainState, *, layout: Layout
) -> TrainStep:
    """The jitted step for a state that lies like this one, which may be of shapes alone."""
    training, config = experiment.training, experiment.optimizer
    return make_train_step(
        members.graphdef,
        optim.make_optimizer(config, members.mask),
        optim.make_schedule(config, total_steps=training.steps),
        learning_rates=_rates(experiment),
        seeds=training.seeds,
        division=division_of(experiment, members, layout),
        loss_normalization=training.loss_normalization,
        z_loss=training.z_loss,
        dropout=experiment.model.dropout_rate > 0 or experiment.method.draws(),
        layout=layout,
        state_shardings=jax.tree.map(lambda array: array.sharding, state),
        remat=training.remat,
        compiler_options=_OPTIONS_OF_PARTS if _on_cpu(layout) else None,
    )


def _rates(experiment: Experiment) -> tuple[float, ...]:
    training = experiment.training
    rate = experiment.optimizer.learning_rate
    return training.learning_rates or (rate,) * len(training.seeds)


def build_predictor(
    experiment: Experiment,
    graphdef: nnx.GraphDef[Attached],
    vocabulary: AnyVocabulary,
    *,
    labels: tuple[str, ...],
) -> Predictor:
    """What turns inputs into predictions, the way the experiment's evaluation asks for."""
    config = experiment.evaluation
    return Predictor(
        graphdef=graphdef,
        vocabulary=vocabulary,
        strategy=config.strategy,
        batch_size=config.batch_size,
        max_length=experiment.data.targets_length,
        num_beams=config.num_beams,
        labels=labels,
        buckets=buckets_of(experiment),
        layout=layout_of(experiment),
    )


def evaluate_members(
    experiment: Experiment, members: Members, tuned: FlatParams, data: TaskData, model: T5
) -> tuple[list[dict[str, float]], dict[str, Predictions]]:
    """Each member's metrics (``task/metric`` where there are several tasks), and predictions."""
    scores: list[dict[str, float]] = [{} for _ in range(members.number)]
    predictions = {}
    for name, examples in data.evaluation.items():
        labels = examples.task.labels
        predictor = build_predictor(
            experiment, members.graphdef, vocabulary_of(model), labels=labels
        )
        predictions[name] = predictor.predict(
            tuned,
            members.frozen,
            examples,
            members=members.number,
            task=members.task_number(name),
        )
        prefix = f"{name}/" if len(data.evaluation) > 1 else ""
        for own, values in zip(scores, score_members(examples, predictions[name]), strict=True):
            own.update({f"{prefix}{metric}": value for metric, value in values.items()})
    return scores, predictions


def member_names(experiment: Experiment) -> tuple[str, ...]:
    """A name per member that says what sets it apart, fit for a file."""
    training = experiment.training
    names = []
    for number, seed in enumerate(training.seeds):
        parts = [f"seed_{seed}"]
        if training.learning_rates:
            parts.append(f"lr_{training.learning_rates[number]!r}")
        if training.inits:
            parts.append(training.inits[number])
        names.append("_".join(parts))
    return tuple(names)


def workdir_of(experiment: Experiment) -> Path:
    """The run's folder; UserError where none is named."""
    if not experiment.training.workdir:
        raise UserError("training.workdir is empty; say where to keep the run with --workdir")
    return Path(experiment.training.workdir).expanduser()


def _import_module(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"data.module: cannot import {name!r}: {error}") from None


def _reports(
    experiment: Experiment,
    train_sets: list[TokenizedExamples],
    train: TrainBatches | None,
    eval_sets: list[TokenizedExamples],
    layout: Layout | None,
) -> Iterator[str]:
    """A line for each set, and what of the batches is padding."""
    for one in train_sets:
        yield one.report()
    if train is not None:
        steps = max(1, min(_REPORTED_STEPS, train.examples_per_epoch // train.batch_size))
        yield _padding_report("batches", train.inputs_lengths, train.padding(0, steps))
    method = experiment.method
    for one in eval_sets:
        yield one.report()
        if isinstance(method, PromptDesign) and method.shots:
            seed = experiment.training.seeds[0]
            yield demonstrations.report(one, shots=method.shots, seed=seed)
        parts = 1 if layout is None else layout.batch_parts
        batch_size = eval_batch_size(experiment.evaluation.batch_size, len(one), parts=parts)
        plan = eval_plan(one, batch_size=batch_size, buckets=buckets_of(experiment))
        lengths = sorted({length for _, length in plan})
        yield _padding_report("evaluation batches", lengths, eval_padding(plan, one))


def _padding_report(what: str, lengths: Sequence[int], percent: float) -> str:
    *others, last = map(str, lengths)
    listed = f"{', '.join(others)} or {last}" if others else last
    return f"{what} of inputs padded to {listed} tokens; {percent:.1f} % of that is padding"


def _best_by(asked: str, eval_sets: list[TokenizedExamples]) -> str:
    """The metric asked for, or the first; UserError for one that evaluations will not have."""
    first = eval_sets[0].task
    if not first.metrics:
        raise UserError(f"task {first.name!r} has no metric; name one in data.metrics")
    names = []
    for one in eval_sets:
        prefix = f"{one.task.name}/" if len(eval_sets) > 1 else ""
        # A metric may give several numbers, of names that only its result tells.
        scores = one.task.score(one.texts, [example["targets"] for example in one.texts])
        names += [prefix + name for name in scores]
    if asked and asked not in names:
        raise UserError(f"evaluation.best_by: no metric {asked!r}: {suggest(asked, names)}")
    return asked or names[0]
