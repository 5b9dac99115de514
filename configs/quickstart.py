"""Trains five prompts at once on the bundled tiny T5 to tell positive from negative words.

prompt-tuning train configs/quickstart.py
"""

from prompt_tuning_jax.config.experiment import Data, Experiment, Model, Optimizer, Training
from prompt_tuning_jax.config.methods import PromptTuning


def get_config() -> Experiment:
    return Experiment(
        model=Model(name_or_path="tiny", dtype="bfloat16", param_dtype="float32", dropout_rate=0.0),
        method=PromptTuning(length=20, init="described"),
        data=Data(task="word_valence", inputs_length=14, targets_length=4),
        optimizer=Optimizer(schedule="linear"),
        training=Training(
            steps=240,
            batch_size=32,
            seeds=(0, 1, 2, 3, 4),
            eval_every=30,
            save_every=60,
            workdir="runs/quickstart",
        ),
    )
