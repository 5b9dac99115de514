"""Refuses options of the command line that set a field without any effect."""

from collections.abc import Mapping

from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.config.methods import split_init
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
_OF_RANDOM_WEIGHTS = ("model.embeddings", "model.attention_init")
_OF_OPTIMIZERS = {
    "adafactor": (
        "decay_rate",
        "clipping_threshold",
        "multiply_by_parameter_scale",
        "min_dim_size_to_factor",
        "initial_step",
    ),
    "adamw": ("beta1", "beta2"),
    "sgd": ("momentum",),
}
# Fields of other groups that only training reads, and those that demonstrations depend on.
_OF_EXAMPLES = ("data.max_train_examples",)
_OF_TRAINING = ("model.dropout_rate", "data.class_weights", *_OF_EXAMPLES)
# Training on text is evaluated by its loss.
_NOT_OF_TEXT = (
    *("evaluation.best_by", "evaluation.best_mode", "data.metrics", "data.labels"),
    *("data.max_train_examples", "data.max_eval_examples", "data.inputs_template"),
)
_OF_FALLING_RATES = ("optimizer.decay_steps", "optimizer.end_learning_rate")
# The initializations that read a field.
_OF_INITS = {
    "method.init_labels": ("class_labels", "described"),
    "method.init_text": ("string", "text"),
    "method.init_path": ("file", "text", "source"),
    "method.source_task": ("source",),
    "method.source_member": ("source",),
}
# The values of ``method.combine`` of multitask prompts that read a field.
_OF_COMBINE = {
    "method.rank": ("low_rank",),
    "method.task_length": ("concatenation",),
    "method.shared_features": ("features", "projection"),
}
# How a prompt is combined with the input; the file of a prompt does not store it.
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
    """Raises UserError for a field that the user sets and that has no effect on the command.

    Args:
      given: the option that sets each field, for example ``--steps`` for ``training.steps``.
      experiment: the experiment, with all options applied.
      command: the command's name.
      prompts: how many prompts the command uses.
      bare_prompts: whether one of the prompts does not belong to a run.
    """
    for field, option in given.items():
        why = _reason(field, experiment, command=command)
        if command in ("eval", "predict"):
            why = why or _reason_without_training(
                field, experiment, command=command, prompts=prompts, bare_prompts=bare_prompts
            )
        if why:
            raise UserError(f"{option} has no effect: {why}")


def _reason(field: str, experiment: Experiment, *, command: str) -> str:
    """Returns why other fields make this one irrelevant; empty if they do not."""
    data, optimizer, training = experiment.data, experiment.optimizer, experiment.training
    combine = getattr(experiment.method, "combine", "")
    falls = optimizer.schedule in ("linear", "cosine")
    inits = {split_init(entry)[0] for entry in training.inits} or {
        getattr(experiment.method, "init", "")
    }
    if command == "serve":
        if not field.startswith(("model.", "mesh.")) and field != "data.module":
            return "serve takes only the fields of model and mesh, and data.module"
    elif command in ("suite", "transfer") and field in _OF_TASKS:
        return ""  # the command replaces it for each task, without harm
    elif command == "ablate" and not field.startswith("data."):
        return ""  # values of the setting that varies may need it
    elif field in _OF_TASKS and (data.train or data.eval) and not data.objectives:
        if field == "data.task" and not data.task:
            return ""  # as the files imply
        file = next(name for name in ("train", "eval") if getattr(data, name))
        return (
            f"the examples come from data.{file}={getattr(data, file)}; to use a task, clear the "
            "files with --set data.train= --set data.eval="
        )
    elif field in _OF_FILES and not (data.train or data.eval) and command != "predict":
        return "it applies to files, and neither data.train nor data.eval names one"
    elif field in _NOT_OF_TEXT and data.objectives:
        return "data.objectives trains on text, which is evaluated by its loss"
    elif field in _OF_TEXT and not data.objectives:
        return "it applies to pre-training, and data.objectives is empty"
    elif field == "evaluation.num_beams" and experiment.evaluation.strategy != "beam":
        return f"evaluation.strategy is {experiment.evaluation.strategy}, not beam"
    elif field in _OF_RANDOM_WEIGHTS and not experiment.model.random_weights:
        return "the weights are not random (model.random_weights is false)"
    elif field in _OF_FALLING_RATES and not falls:
        return f"optimizer.schedule is {optimizer.schedule}, neither linear nor cosine"
    elif field == "optimizer.learning_rate" and training.learning_rates:
        if falls and optimizer.end_learning_rate:
            return ""  # the ratio of the two is that of every seed
        return "training.learning_rates has one for each seed"
    elif field == "method.init" and training.inits:
        return "training.inits has one for each seed"
    elif field in _OF_INITS and not inits & {*_OF_INITS[field]}:
        chosen, wanted = ", ".join(sorted(inits)), " or ".join(_OF_INITS[field])
        return f"it applies to method.init={wanted}, and the method starts from {chosen}"
    elif field in _OF_COMBINE and combine not in ("", *_OF_COMBINE[field]):
        wanted = " or ".join(_OF_COMBINE[field])
        return f"it applies to method.combine={wanted}, and method.combine is {combine}"
    elif field == "training.wayward_weight" and not training.wayward_text:
        return "training.wayward_text is empty"
    group, _, name = field.partition(".")
    for of, names in _OF_OPTIMIZERS.items():
        if group == "optimizer" and name in names and of != optimizer.name:
            return f"it applies to {of}, and optimizer.name is {optimizer.name}"
    return ""


def _reason_without_training(
    field: str, experiment: Experiment, *, command: str, prompts: int, bare_prompts: bool
) -> str:
    """Returns why the field is irrelevant to a command that does not train.

    Returns "" if it is relevant.
    """
    method = experiment.method
    group = field.partition(".")[0]
    if group == "method" and not method.composes_inputs:
        if not prompts:
            return (
                f"{command} without --prompt uses the model without a method; only "
                "method=prompt_design needs no training"
            )
        joins = field in _JOINING or (field == "method" and method.plain_prompt() is not None)
        if not (joins and bare_prompts):
            return f"{command} uses the method that --prompt was trained with"
    elif field == "training.seeds" and _uses_seeds(experiment):
        return ""
    elif group in ("optimizer", "training") or (
        field in _OF_TRAINING and not (method.composes_inputs and field in _OF_EXAMPLES)
    ):
        return f"{command} does not train"
    elif command == "predict" and field in ("data.metrics", "evaluation.best_by"):
        return "predict computes no scores"
    return ""


def _uses_seeds(experiment: Experiment) -> bool:
    """Returns whether the result of an evaluation depends on the seeds."""
    return experiment.method.composes_inputs or experiment.model.random_weights
