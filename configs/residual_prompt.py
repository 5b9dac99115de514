"""Residual prompt tuning of the bundled tiny T5 on the quickstart's task.

prompt-tuning train configs/residual_prompt.py

An MLP is added to the prompt during training; it has a hundred times lower learning rate than the
prompt.  The run saves a plain prompt.
"""

from prompt_tuning_jax.config.experiment import Data, Experiment, Model, Optimizer, Training
from prompt_tuning_jax.config.methods import ResidualPrompt


def get_config() -> Experiment:
    return Experiment(
        model=Model(name_or_path="tiny", dtype="bfloat16", param_dtype="float32", dropout_rate=0.0),
        method=ResidualPrompt(length=20, init="described"),
        data=Data(task="word_valence", inputs_length=14, targets_length=4),
        optimizer=Optimizer(schedule="linear", rates=("method/mlp/.*=0.01",)),
        training=Training(
            steps=240, batch_size=32, eval_every=30, save_every=60, workdir="runs/residual_prompt"
        ),
    )
