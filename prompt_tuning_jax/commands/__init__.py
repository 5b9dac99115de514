"""What the commands do: train, evaluate, predict, tasks, metrics, inspect, convert, merge, suite...

Each is imported when it is first asked for: those that compute nothing do without JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prompt_tuning_jax.commands.conversion import convert
    from prompt_tuning_jax.commands.evaluation import EvalResult, evaluate, prediction_rows
    from prompt_tuning_jax.commands.example_configs import (
        examples_with_titles,
        init,
        own_data_experiment,
    )
    from prompt_tuning_jax.commands.inspection import describe, inspect
    from prompt_tuning_jax.commands.listing import dump, examples, tasks
    from prompt_tuning_jax.commands.merging import merge
    from prompt_tuning_jax.commands.planning import plan_as_dict, plan_lines, plan_run
    from prompt_tuning_jax.commands.prediction import UNDESCRIBED, Prediction, predict
    from prompt_tuning_jax.commands.prediction_files import (
        evaluated_text,
        form_of,
        predictions_text,
    )
    from prompt_tuning_jax.commands.recycling import Recycled, recycle
    from prompt_tuning_jax.commands.scoring import Scored, metrics
    from prompt_tuning_jax.commands.serving import Serving, default_experiment, serve
    from prompt_tuning_jax.commands.similarity import Similar, similar
    from prompt_tuning_jax.commands.suites import SuiteResult, suite, try_transfer, with_seeds
    from prompt_tuning_jax.run import RunResult, train

__all__ = [
    "UNDESCRIBED",
    "EvalResult",
    "Prediction",
    "Recycled",
    "RunResult",
    "Scored",
    "Serving",
    "Similar",
    "SuiteResult",
    "convert",
    "default_experiment",
    "describe",
    "dump",
    "evaluate",
    "evaluated_text",
    "examples",
    "examples_with_titles",
    "form_of",
    "init",
    "inspect",
    "merge",
    "metrics",
    "own_data_experiment",
    "plan_as_dict",
    "plan_lines",
    "plan_run",
    "predict",
    "prediction_rows",
    "predictions_text",
    "recycle",
    "serve",
    "similar",
    "suite",
    "tasks",
    "train",
    "try_transfer",
    "with_seeds",
]

_HOMES = {
    "commands.conversion": ("convert",),
    "commands.evaluation": ("EvalResult", "evaluate", "prediction_rows"),
    "commands.example_configs": ("examples_with_titles", "init", "own_data_experiment"),
    "commands.inspection": ("describe", "inspect"),
    "commands.listing": ("dump", "examples", "tasks"),
    "commands.merging": ("merge",),
    "commands.planning": ("plan_as_dict", "plan_lines", "plan_run"),
    "commands.prediction": ("UNDESCRIBED", "Prediction", "predict"),
    "commands.prediction_files": ("evaluated_text", "form_of", "predictions_text"),
    "commands.recycling": ("Recycled", "recycle"),
    "commands.scoring": ("Scored", "metrics"),
    "commands.similarity": ("Similar", "similar"),
    "commands.serving": ("Serving", "default_experiment", "serve"),
    "commands.suites": ("SuiteResult", "suite", "try_transfer", "with_seeds"),
    "run": ("RunResult", "train"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"prompt_tuning_jax.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
