"""Benchmarks of the bundled tiny T5 on a laptop: five prompts at once for each task.

prompt-tuning suite super_glue --config configs/suite_tiny.py --data_dir D --workdir runs/super_glue

Inputs are cut to 96 tokens, so long passages lose their ends; the table shows how many were cut.
"""

from prompt_tuning_jax.config.experiment import (
    Data,
    Evaluation,
    Experiment,
    Model,
    Optimizer,
    Training,
)
from prompt_tuning_jax.config.methods import PromptTuning


def get_config() -> Experiment:
    return Experiment(
        model=Model(name_or_path="tiny", dtype="bfloat16", param_dtype="float32", dropout_rate=0.0),
        method=PromptTuning(length=10, init="class_labels"),
        # The command selects the tasks.
        data=Data(inputs_length=96, targets_length=16, max_eval_examples=500),
        optimizer=Optimizer(schedule="linear"),
        training=Training(
            steps=120,
            batch_size=16,
            seeds=(0, 1, 2, 3, 4),
            eval_every=60,
            save_every=60,
            workdir="runs/suite_tiny",
        ),
        evaluation=Evaluation(strategy="rank"),
    )
