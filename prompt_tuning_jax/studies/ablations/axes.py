"""What an ablation varies: the axes of figures 1 to 3 of Lester et al. 2021, and two more."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.config.overrides import apply_override
from prompt_tuning_jax.errors import UserError, suggest
from prompt_tuning_jax.methods import METHODS, PromptDesign, method_name
from prompt_tuning_jax.studies.ablations.methods import compared
from prompt_tuning_jax.studies.transfer import as_model_tuning

# What the targets of the span-corruption objective begin with.
SENTINEL = "<extra_id_0>"
SHOTS = 4  # demonstrations of prompt design
Scale = Literal["log", "steps", "names"]


@dataclass(frozen=True, kw_only=True)
class Value:
    """A value of an axis: its name, and for axes of models the model's name."""

    name: str
    model: str = ""

    def __str__(self) -> str:
        return f"{self.name}={self.model}" if self.model else self.name


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A setting that an ablation varies.

    Attributes:
      title: what the figure calls it.
      apply: the experiment with a value of the axis.
      scale: how the figure spaces the values: by logarithm, by number, or evenly by name.
      defaults: values if the user names none; empty: the user must name them.
      of_models: whether values are written NAME=MODEL.
      member_field: the field of ``training`` that gives each member its value, if members of one
        run may differ in it.
    """

    name: str
    title: str
    apply: Callable[[Experiment, Value], Experiment]
    scale: Scale
    defaults: tuple[str, ...] = ()
    of_models: bool = False
    member_field: Literal["", "learning_rates", "inits"] = ""

    @property
    def label(self) -> str:
        """The name in tables: that of a field as configs have it."""
        return self.name if "." in self.name else self.name.replace("_", " ")


def _field(path: str) -> Callable[[Experiment, Value], Experiment]:
    return lambda experiment, value: apply_override(experiment, f"{path}={value.name}")


def _model(experiment: Experiment, value: Value) -> Experiment:
    model = dataclasses.replace(experiment.model, name_or_path=value.model or value.name)
    return dataclasses.replace(experiment, model=model)


def _objective(experiment: Experiment, value: Value) -> Experiment:
    experiment = _model(experiment, value)
    if value.name != "sentinel":
        return experiment
    data = dataclasses.replace(experiment.data, targets_prefix=f"{SENTINEL} ")
    return dataclasses.replace(experiment, data=data)


def _method(experiment: Experiment, value: Value) -> Experiment:
    """Returns the experiment with another method and its optimizer.

    The config's method keeps the config's settings.  Model tuning has T5's recipe for fine-tuning;
    the other methods have the middle of the learning rates that ``methods`` lists.
    """
    if value.name == method_name(experiment.method):
        return experiment
    if value.name == "full":
        return as_model_tuning(experiment)
    known = _compared(experiment)
    if value.name not in known:
        raise UserError(f"--values {value.name}: unknown method: {suggest(value.name, known)}")
    what = known[value.name]
    training = dataclasses.replace(experiment.training, learning_rates=(), inits=())
    changed = dataclasses.replace(experiment, method=what.method, training=training)
    if isinstance(what.method, PromptDesign):
        return with_shots(changed, SHOTS)
    rates = what.rates or (experiment.optimizer.learning_rate,)
    warmup = training.steps // 20 if what.optimizer.name == "adamw" else 0
    optimizer = dataclasses.replace(
        what.optimizer, learning_rate=rates[len(rates) // 2], warmup_steps=warmup
    )
    return dataclasses.replace(changed, optimizer=optimizer)


def with_shots(experiment: Experiment, shots: int) -> Experiment:
    """Returns prompt design with so many demonstrations, and inputs long enough for them."""
    data = experiment.data
    length = data.inputs_length + shots * (data.inputs_length + data.targets_length)
    return dataclasses.replace(
        experiment,
        method=PromptDesign(shots=shots),
        data=dataclasses.replace(data, inputs_length=length),
    )


def rates_of(experiment: Experiment, name: str) -> tuple[float, ...]:
    """Returns the learning rates to try for a method; empty if it trains nothing."""
    known = _compared(experiment)
    return known[name].rates if name in known else ()


def _compared(experiment: Experiment) -> Mapping[str, Any]:
    method = experiment.method
    length, init = getattr(method, "length", 20), getattr(method, "init", "sampled_vocabulary")
    return compared(length=length, init=init)


AXES: Mapping[str, Axis] = {
    axis.name: axis
    for axis in (
        Axis(
            name="length",
            title="prompt length",
            apply=_field("method.length"),
            scale="names",
            defaults=("1", "5", "20", "100", "150"),
        ),
        Axis(
            name="init",
            title="initialization",
            apply=_field("method.init"),
            scale="names",
            defaults=("uniform", "sampled_vocabulary", "class_labels"),
            member_field="inits",
        ),
        Axis(
            name="learning_rate",
            title="learning rate",
            apply=_field("optimizer.learning_rate"),
            scale="log",
            defaults=("0.01", "0.03", "0.1", "0.3", "1.0"),
            member_field="learning_rates",
        ),
        Axis(
            name="method",
            title="method",
            apply=_method,
            scale="names",
            defaults=("full", "prompt_tuning", "prompt_design"),
        ),
        Axis(name="size", title="parameters of the model", apply=_model, scale="log"),
        Axis(
            name="objective",
            title="pre-training objective",
            apply=_objective,
            scale="names",
            of_models=True,
        ),
        Axis(
            name="lm_steps",
            title="steps of LM adaptation",
            apply=_model,
            scale="steps",
            of_models=True,
        ),
    )
}
OBJECTIVES = ("span_corruption", "sentinel", "lm_adaptation")
# Fields of ``training`` that an ablation sets for each run.
_SET_FOR_EACH_RUN = ("seeds", "learning_rates", "inits", "workdir")


def get_axis(name: str, *, option: str) -> Axis:
    """Returns the axis with that name, or that varies the field of the config with that path.

    Raises UserError with the nearest name if it is unknown, and for a field that an ablation sets.
    """
    if name in [f"training.{field}" for field in _SET_FOR_EACH_RUN]:
        raise UserError(f"{option}: {name} cannot vary, because an ablation sets it for each run")
    if "." in name:
        field = name.replace("_", " ").rpartition(".")[2]
        return Axis(name=name, title=field, apply=_field(name), scale="names")
    if name not in AXES:
        known = suggest(name, AXES)
        raise UserError(
            f"{option}: unknown setting {name!r}: {known}, or a field such as data.task"
        )
    return AXES[name]


def require_one_setting(experiment: Experiment) -> None:
    """Raises UserError for a learning rate or initialization of each seed, which a study sets."""
    instead = {"learning_rates": "optimizer.learning_rate", "inits": "method.init"}
    for name, field in instead.items():
        if getattr(experiment.training, name):
            raise UserError(
                f"training.{name} has no effect: the study says what each seed has; leave it "
                f"empty, and set {field}"
            )


def values_of(axis: Axis, texts: Sequence[str], *, option: str) -> tuple[Value, ...]:
    """Returns the values that the user named, or the defaults.

    Raises UserError if there are none, one is named twice, or one is not what the axis needs.
    """
    texts = texts or axis.defaults
    if not texts:
        what = "STEPS=MODEL,..." if axis.name == "lm_steps" else "NAME=MODEL,..."
        example = what if axis.of_models else "A,B" if "." in axis.name else "MODEL,MODEL,..."
        raise UserError(f"{option} is needed for {axis.name}: {example}")
    values: list[Value] = []
    for text in texts:
        name, equals, model = text.partition("=")
        if axis.of_models and not (name and equals and model):
            raise UserError(f"{option} {text}: {axis.name} needs NAME=MODEL for each value")
        if axis.name == "objective" and name not in OBJECTIVES:
            raise UserError(f"{option} {text}: {suggest(name, OBJECTIVES)}")
        if axis.name == "lm_steps" and not name.isdecimal():
            raise UserError(f"{option} {text}: {name!r} is not a number of steps")
        value = Value(name=name, model=model) if axis.of_models else Value(name=text)
        if value.name in [other.name for other in values]:
            raise UserError(f"{option} names {value.name} twice")
        values.append(value)
        if axis.name == "method" and name not in METHODS:
            raise UserError(f"{option}: unknown method {name!r}: {suggest(name, METHODS)}")
    return tuple(values)
