"""Fields that a command would not look at: what sets one without effect is refused."""

from collections.abc import Mapping

from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.config.methods import PromptDesign, PromptTuning
from prompt_tuning_jax.errors import UserError

_OF_TASKS = ("data.task", "data.module", "data.data_dir")
_OF_FILES = (
    *(f"data.{part}_{kind}" for part in ("inputs", "targets") for kind in ("column", "template")),
    *(f"data.{name}" for name in ("targets", "allow_empty_targets", "header", "columns")),
    "data.separator",
)
_OF_TEXT = tuple(
    f"data.{name}"
    for name in ("objective_weights", "noise_density", "mean_span_length", "dictionary", "probes")
)
_OF_OPTIMIZERS = {
    "adafactor": (
        "decay_rate",
        "clipping_threshold",
        "multiply_by_parameter_scale",
        "min_dim_size_to_factor",
    ),
    "adamw": ("beta1", "beta2"),
    "sgd": ("momentum",),
}
# How a prompt is joined to the input, of which a bare prompt file says nothing.
_JOINING = tuple(
    f"method.{name}"
    for name in ("placement", "prompt_to_input", "prompt_to_prompt", "input_to_prompt")
)


def require_effect(
    given: Mapping[str, str],
    experiment: Experiment,
    *,
    command: str,
    prompts: int = 0,
    bare_prompts: bool = False,
) -> None:
    """UserError for a field that the user gave and that changes nothing of what the command does.

    ``given`` is field -> how it was given; ``experiment`` has it all applied.  ``prompts`` is how
    many are used, and ``bare_prompts`` whether one of them is of no run.
    """
    for field, shown in given.items():
        why = _why_not(field, experiment, command=command)
        if command in ("eval", "predict"):
            why = why or _why_not_trained(
                field, experiment, command=command, prompts=prompts, bare_prompts=bare_prompts
            )
        if why:
            raise UserError(f"{shown} would change nothing: {why}")


def _why_not(field: str, experiment: Experiment, *, command: str) -> str:
    """Because of other fields."""
    data, optimizer, training = experiment.data, experiment.optimizer, experiment.training
    if command == "serve":
        if not field.startswith(("model.", "mesh.")) and field != "data.module":
            return "serve takes the fields of model and mesh, and data.module"
    elif command in ("suite", "transfer") and field in _OF_TASKS:
        return ""  # each task takes the place of what the config names
    elif field in _OF_TASKS and (data.train or data.eval) and not data.objectives:
        if field == "data.task" and not data.task:
            return ""  # it says the same
        file = next(name for name in ("train", "eval") if getattr(data, name))
        return (
            f"the examples are those of data.{file}={getattr(data, file)}; for a task empty what "
            "names files, --set data.train= --set data.eval="
        )
    elif field in _OF_FILES and not (data.train or data.eval) and command != "predict":
        return "it is of files, and neither data.train nor data.eval names one"
    elif field in _OF_TEXT and not data.objectives:
        return "it is of pre-training, and data.objectives is empty"
    elif field == "evaluation.num_beams" and experiment.evaluation.strategy != "beam":
        return f"evaluation.strategy is {experiment.evaluation.strategy}, not beam"
    elif field in ("model.embeddings", "model.attention") and not experiment.model.random_weights:
        return "the weights are not random (model.random_weights)"
    elif field == "optimizer.learning_rate" and training.learning_rates:
        return "training.learning_rates has one for each seed"
    elif field == "method.init" and training.inits:
        return "training.inits has one for each seed"
    group, _, name = field.partition(".")
    for of, names in _OF_OPTIMIZERS.items():
        if group == "optimizer" and name in names and of != optimizer.name:
            return f"it is of {of}, and optimizer.name is {optimizer.name}"
    return ""


def _why_not_trained(
    field: str, experiment: Experiment, *, command: str, prompts: int, bare_prompts: bool
) -> str:
    """Because nothing is trained."""
    method = experiment.method
    group = field.partition(".")[0]
    if group == "method" and not isinstance(method, PromptDesign):
        if not prompts:
            return (
                f"{command} without --prompt is of the bare model; a method trains first, but for "
                "method=prompt_design"
            )
        joins = field in _JOINING or (field == "method" and isinstance(method, PromptTuning))
        if not (joins and bare_prompts):
            return f"{command} takes what --prompt holds, and its method, as it was trained"
    elif field == "training.seeds" and _draws(experiment):
        return ""
    elif group in ("optimizer", "training") or field == "model.dropout_rate":
        return f"{command} trains nothing"
    elif command == "predict" and field in ("data.metrics", "evaluation.best_by"):
        return "predict scores nothing"
    return ""


def _draws(experiment: Experiment) -> bool:
    """Whether seeds decide what is evaluated."""
    return isinstance(experiment.method, PromptDesign) or experiment.model.random_weights
