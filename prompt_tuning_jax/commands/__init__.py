"""What the commands do: train, evaluate, predict, tasks, metrics, inspect, convert, suite..."""

from prompt_tuning_jax.commands.conversion import convert
from prompt_tuning_jax.commands.evaluation import EvalResult, Prediction, evaluate, predict
from prompt_tuning_jax.commands.inspection import describe, inspect
from prompt_tuning_jax.commands.listing import dump, examples, tasks
from prompt_tuning_jax.commands.scoring import Scored, metrics
from prompt_tuning_jax.commands.suites import SuiteResult, suite, try_transfer, with_seeds
from prompt_tuning_jax.run import RunResult, train

__all__ = [
    "EvalResult",
    "Prediction",
    "RunResult",
    "Scored",
    "SuiteResult",
    "convert",
    "describe",
    "dump",
    "evaluate",
    "examples",
    "inspect",
    "metrics",
    "predict",
    "suite",
    "tasks",
    "train",
    "try_transfer",
    "with_seeds",
]
