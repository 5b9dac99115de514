"""Multitask prompt tuning (MPT) on SuperGLUE: a shared prompt, and low-rank factors per task.

prompt-tuning train configs/multitask_prompts.py --data_dir SuperGLUE

Any mixture can be used.  To start a single task from the run, use `--set data.task=TASK
--set method.init=source --set method.init_path=runs/multitask_prompts` and another workdir.
"""

from prompt_tuning_jax.config.experiment import (
    Data,
    Evaluation,
    Experiment,
    Model,
    Optimizer,
    Training,
)
from prompt_tuning_jax.config.methods import MultitaskPrompts


def get_config() -> Experiment:
    return Experiment(
        model=Model(name_or_path="tiny", dtype="bfloat16", param_dtype="float32", dropout_rate=0.0),
        method=MultitaskPrompts(length=20, combine="low_rank"),
        data=Data(
            task="super_glue_v102_examples_proportional", inputs_length=128, targets_length=8
        ),
        optimizer=Optimizer(schedule="linear"),
        training=Training(
            steps=240, batch_size=32, eval_every=60, save_every=60, workdir="runs/multitask_prompts"
        ),
        evaluation=Evaluation(strategy="greedy"),
    )
