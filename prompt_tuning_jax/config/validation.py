"""Refuses values of an Experiment that have the right type but are invalid."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from prompt_tuning_jax.config.base import Config, field_types
from prompt_tuning_jax.config.experiment import (
    Data,
    Evaluation,
    Experiment,
    Mesh,
    Optimizer,
    Training,
)
from prompt_tuning_jax.config.field_syntax import (
    logits_processor_errors,
    parse_buckets,
    parse_class_weights,
    parse_rates,
    parse_rules,
)
from prompt_tuning_jax.config.methods import PromptTuning, split_init
from prompt_tuning_jax.config.overrides import checked, checked_experiment
from prompt_tuning_jax.errors import UserError

_LOGITS = "model/decoder/logits_dense/kernel"  # path of a frozen weight
# Seeds that the random number generators of both numpy and JAX accept.
_MAX_SEED = 2**31


def validate(experiment: Experiment) -> Experiment:
    """Returns the experiment with its values in their exact types.

    Raises UserError for the first invalid value.

    Checks the experiment only: whoever opens files, tasks and models checks that they exist.
    """
    experiment = checked_experiment(experiment)
    for error in _errors(experiment):
        raise UserError(error)
    return experiment


def _errors(experiment: Experiment) -> Iterator[str]:
    model, method = experiment.model, type(experiment.method).__name__
    for field in fields(experiment):
        yield from getattr(experiment, field.name).bound_errors(field.name)
    if not model.name_or_path:
        yield "model.name_or_path is empty; name a model or a folder, for example tiny"
    yield from _not_below_one("model", model, "dropout_rate")
    for choice, plain in (("quantization", "none"), ("weights", "dequantized")):
        if (value := getattr(model, choice)) == plain:
            continue
        if experiment.method.trains(_LOGITS):
            yield (
                f"model.{choice} is {value}, but {method} trains the weights; set "
                f"model.{choice}={plain}"
            )
        for name in ("embeddings", "attention_init"):
            if model.random_weights and getattr(model, name) != "normal":
                yield (
                    f"model.{name} needs weights that train; set it to normal, "
                    f"or model.{choice}={plain}"
                )
    if model.weights == "quantized" and model.quantization != "none":
        yield (
            f"model.weights is quantized and model.quantization is {model.quantization}; drop one"
        )
    if model.weights == "quantized" and model.random_weights:
        yield "model.weights is quantized, but model.random_weights reads no file; drop one"
    yield from experiment.method.config_errors()
    if experiment.method.scores_labels and experiment.evaluation.strategy not in ("rank", "auto"):
        yield (
            f"evaluation.strategy is {experiment.evaluation.strategy}, but "
            f"{method} scores labels and generates no text; set it to rank"
        )
    if experiment.method.scores_labels and experiment.evaluation.normalize_length:
        yield (
            f"evaluation.normalize_length is true, but {method} does not score labels by their "
            "tokens; set it to false"
        )
    yield from _data(experiment.data)
    yield from _optimizer(experiment.optimizer, steps=experiment.training.steps)
    yield from _training(experiment.training, method=experiment.method)
    if experiment.training.loss != "tokens" and experiment.data.objectives:
        yield (
            f"training.loss is {experiment.training.loss}, but data.objectives trains on text; set "
            "it to tokens"
        )
    yield from _evaluation(experiment.evaluation, targets_length=experiment.data.targets_length)
    yield from _mesh(experiment.mesh)


def _data(data: Data) -> Iterator[str]:
    if not (data.task or data.train or data.eval):
        yield "data.task is empty; name a task, or your files in data.train and data.eval"
    if (repeated := _repeated(data.labels)) is not None:
        yield f"data.labels has {repeated!r} twice"
    parse_class_weights(data.class_weights)
    if data.class_weights and data.objectives:
        yield "data.class_weights needs labels, but data.objectives trains on text; drop one"
    own_files = bool(data.train or data.eval) and not data.objectives
    of_files = ("targets", "targets_column", "targets_template", "allow_empty_targets")
    for name in (*of_files, "header", "columns", "separator"):
        if not own_files and getattr(data, name) != getattr(Data(), name):
            yield (
                f"data.{name} applies to files, and neither data.train nor data.eval names one; "
                "drop it"
            )
    if data.targets == "text" and data.labels:
        yield "data.targets is text, but data.labels names labels; drop one of them"
    if (repeated := _repeated(data.columns)) is not None:
        yield f"data.columns has {repeated!r} twice"
    if len(data.separator) > 1 and data.separator.lower() not in ("tab", "\\t"):
        yield f"data.separator is {data.separator!r}; must be one character, or tab"
    longest = max(parse_buckets(data.buckets)[0], default=0)
    if longest > data.inputs_length:
        yield (
            f"data.buckets has {longest}; data.inputs_length is {data.inputs_length} and must be "
            "at least as large"
        )
    if data.objectives and not data.train:
        yield "data.objectives needs data.train, a folder of text files"
    if data.objective_weights and len(data.objective_weights) != len(data.objectives):
        yield (
            f"data.objective_weights has {len(data.objective_weights)} entries, but "
            f"data.objectives has {len(data.objectives)}; give one for each, or none"
        )
    if data.probes and not data.objectives:
        yield "data.probes needs data.objectives: probes apply to pre-training"
    if "dictionary" in data.objectives and not data.dictionary:
        yield (
            "data.dictionary is empty, but data.objectives has dictionary; set it to the folder of "
            "WordNet's files (Debian: apt install wordnet-base, then /usr/share/wordnet)"
        )
    if data.objective_weights and min(data.objective_weights) <= 0:
        yield f"data.objective_weights has {min(data.objective_weights)}; must be above 0"
    if not 0 < data.noise_density < 1:
        yield f"data.noise_density is {data.noise_density}; must be above 0 and below 1"


def _optimizer(optimizer: Optimizer, *, steps: int) -> Iterator[str]:
    if optimizer.decay_rate > 1:
        yield f"optimizer.decay_rate is {optimizer.decay_rate}; must be from 0 to 1"
    yield from _not_below_one("optimizer", optimizer, "beta1", "beta2", "momentum")
    parse_rates(optimizer.rates)
    end = optimizer.decay_steps or steps
    if optimizer.schedule in ("linear", "cosine") and 0 < end <= optimizer.warmup_steps:
        yield (
            f"optimizer.warmup_steps is {optimizer.warmup_steps}, but the {optimizer.schedule} "
            f"schedule ends at step {end} (optimizer.decay_steps or training.steps); lower it"
        )


def _loss(training: Training, *, method: Any) -> Iterator[str]:
    loss, name = training.loss, type(method).__name__
    if training.margin and loss not in ("perceptron", "hinge"):
        yield f"training.margin applies to training.loss=hinge and perceptron, not {loss}; drop it"
    if training.normalize_length and loss == "tokens":
        yield "training.normalize_length applies to losses over labels, not to tokens; drop it"
    if training.z_loss and loss in ("perceptron", "hinge"):
        yield f"training.z_loss applies to cross entropy, and training.loss is {loss}; set it to 0"
    if loss != "tokens" and method.has_own_loss:
        yield f"training.loss is {loss}, but {name} has a loss of its own; set it to tokens"
    if training.wayward_text and not isinstance(method, PromptTuning):
        yield (
            "training.wayward_text holds a prompt of method=prompt_tuning near a text, and the "
            f"method is {name}; drop it"
        )


def _training(training: Training, *, method: Any) -> Iterator[str]:
    yield from _loss(training, method=method)
    if training.gradient_accumulation >= 1 and training.batch_size % training.gradient_accumulation:
        yield (
            f"training.batch_size is {training.batch_size}; it must be divisible by "
            f"training.gradient_accumulation, which is {training.gradient_accumulation}"
        )
    seeds = training.seeds
    if not seeds:
        yield "training.seeds is empty; give one seed per prompt, for example 0"
    for seed in seeds:
        if not 0 <= seed < _MAX_SEED:
            yield f"training.seeds has {seed}; must be from 0 to {_MAX_SEED - 1}"
    for name in ("learning_rates", "inits"):
        entries = getattr(training, name)
        if entries and len(entries) != len(seeds):
            yield (
                f"training.{name} has {len(entries)} entries, but training.seeds has {len(seeds)}; "
                "give one per seed, or none"
            )
    for rate in training.learning_rates:
        if rate < 0:
            yield f"training.learning_rates has {rate}; must be at least 0"
    if training.inits:
        if (init := field_types(type(method)).get("init")) is None:
            yield f"training.inits has no effect: {type(method).__name__} has no init"
        for entry in training.inits:
            name, path = split_init(entry)
            if path and name == "file":
                entry = name
            checked(entry, init, "training.inits")
    # Equal entries would train the same prompt twice.
    each = zip(seeds, training.learning_rates or seeds, training.inits or seeds, strict=True)
    if (repeated := _repeated(tuple(each))) is not None:
        yield f"training.seeds has {repeated[0]} twice, with the same learning rate and init"


_NEEDED_STRATEGIES = {
    "num_beams": ("beam",),
    "normalize_length": ("rank",),
    "min_length": ("greedy", "beam"),
    "repetition_penalty": ("greedy", "beam"),
    "no_repeat_ngram_size": ("greedy", "beam"),
}


def _evaluation(evaluation: Evaluation, *, targets_length: int) -> Iterator[str]:
    for error in logits_processor_errors(
        min_length=evaluation.min_length,
        repetition_penalty=evaluation.repetition_penalty,
        no_repeat_ngram_size=evaluation.no_repeat_ngram_size,
        max_length=targets_length,
    ):
        yield f"evaluation.{error}"
    defaults = Evaluation()
    for name, strategies in _NEEDED_STRATEGIES.items():
        value = getattr(evaluation, name)
        if value != getattr(defaults, name) and evaluation.strategy not in strategies:
            yield (
                f"evaluation.{name} is {value}, which needs evaluation.strategy="
                f"{' or '.join(strategies)}; evaluation.strategy is {evaluation.strategy}"
            )


def _mesh(mesh: Mesh) -> Iterator[str]:
    sizes = (mesh.data, mesh.fsdp, mesh.model)
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        yield (
            f"mesh is data={mesh.data}, fsdp={mesh.fsdp}, model={mesh.model}; each must be at "
            "least 1, or -1 on one of them for all remaining devices"
        )
    parse_rules(mesh.rules)


def _not_below_one(group: str, config: Config, *names: str) -> Iterator[str]:
    for name in names:
        if (value := getattr(config, name)) >= 1:
            yield f"{group}.{name} is {value}; must be below 1"


def _repeated(entries: tuple[Any, ...]) -> Any:
    return next((entry for entry, count in Counter(entries).items() if count > 1), None)
