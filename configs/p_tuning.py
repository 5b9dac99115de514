"""P-tuning of the bundled tiny T5 on the quickstart's task: an LSTM computes the prompt.

prompt-tuning train configs/p_tuning.py

The trainable parameters are an encoder's weights, which need a lower learning rate than a prompt.
"""

from prompt_tuning_jax.config.experiment import Data, Experiment, Model, Optimizer, Training
from prompt_tuning_jax.config.methods import PTuning


def get_config() -> Experiment:
    return Experiment(
        model=Model(name_or_path="tiny", dtype="bfloat16", param_dtype="float32", dropout_rate=0.0),
        method=PTuning(length=20),
        data=Data(task="word_valence", inputs_length=14, targets_length=4),
        optimizer=Optimizer(learning_rate=0.003, schedule="linear"),
        training=Training(
            steps=240, batch_size=32, eval_every=30, save_every=60, workdir="runs/p_tuning"
        ),
    )
