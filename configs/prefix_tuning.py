"""Prefix tuning of the bundled tiny T5 on the quickstart's task: keys and values in every layer.

prompt-tuning train configs/prefix_tuning.py

The prefixes are initialized with keys and values that the model computes for words, and have a
three times lower learning rate than prompts.
"""

from prompt_tuning_jax.config.experiment import Data, Experiment, Model, Optimizer, Training
from prompt_tuning_jax.config.methods import PrefixTuning


def get_config() -> Experiment:
    return Experiment(
        model=Model(name_or_path="tiny", dtype="bfloat16", param_dtype="float32", dropout_rate=0.0),
        method=PrefixTuning(length=20),
        data=Data(task="word_valence", inputs_length=14, targets_length=4),
        optimizer=Optimizer(learning_rate=0.1, schedule="linear"),
        training=Training(
            steps=240, batch_size=32, eval_every=30, save_every=60, workdir="runs/prefix_tuning"
        ),
    )
