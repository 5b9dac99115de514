"""WARP on the bundled tiny T5 and the quickstart's task: class vectors score the first position.

prompt-tuning train configs/warp.py

They are initialized with the output head's vectors for the labels, and have a hundred times lower
learning rate than the prompt.
"""

from prompt_tuning_jax.config.experiment import Data, Experiment, Model, Optimizer, Training
from prompt_tuning_jax.config.methods import WARP


def get_config() -> Experiment:
    return Experiment(
        model=Model(name_or_path="tiny", dtype="bfloat16", param_dtype="float32", dropout_rate=0.0),
        method=WARP(length=20, init="described"),
        data=Data(task="word_valence", inputs_length=14, targets_length=4),
        optimizer=Optimizer(schedule="linear", rates=("method/class_CD=0.01",)),
        training=Training(
            steps=240, batch_size=32, eval_every=30, save_every=60, workdir="runs/warp"
        ),
    )
