"""What the commands do: train, evaluate, predict, tasks, metrics, inspect, convert."""

from prompt_tuning_jax.commands.conversion import convert
from prompt_tuning_jax.commands.evaluation import EvalResult, Prediction, evaluate, predict
from prompt_tuning_jax.commands.inspection import describe, inspect
from prompt_tuning_jax.commands.listing import dump, examples, tasks
from prompt_tuning_jax.commands.scoring import Scored, metrics
from prompt_tuning_jax.run import RunResult, train

__all__ = [
    "EvalResult",
    "Prediction",
    "RunResult",
    "Scored",
    "convert",
    "describe",
    "dump",
    "evaluate",
    "examples",
    "inspect",
    "metrics",
    "predict",
    "tasks",
    "train",
]
