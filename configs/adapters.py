"""Houlsby's adapters of the bundled tiny T5, on the quickstart's task.

prompt-tuning train configs/adapters.py
"""

from prompt_tuning_jax.config.experiment import Data, Experiment, Model, Optimizer, Training
from prompt_tuning_jax.config.methods import Adapters


def get_config() -> Experiment:
    return Experiment(
        model=Model(name_or_path="tiny", dtype="bfloat16", param_dtype="float32", dropout_rate=0.0),
        method=Adapters(width=16),
        data=Data(task="word_valence", inputs_length=14, targets_length=4),
        optimizer=Optimizer(learning_rate=0.005, schedule="linear", weight_decay=0.0),
        training=Training(
            steps=240, batch_size=32, eval_every=30, save_every=60, workdir="runs/adapters"
        ),
    )
