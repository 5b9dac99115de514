"""ADePT of the bundled tiny T5 on the quickstart's task: a prompt, and a network that moves tokens.

prompt-tuning train configs/adept.py

It trains about as many parameters as a prompt of 20 vectors.  The network has a ten times lower
learning rate than the prompt.
"""

from prompt_tuning_jax.config.experiment import Data, Experiment, Model, Optimizer, Training
from prompt_tuning_jax.config.methods import ADePT


def get_config() -> Experiment:
    return Experiment(
        model=Model(name_or_path="tiny", dtype="bfloat16", param_dtype="float32", dropout_rate=0.0),
        method=ADePT(length=10, hidden=4, init="described"),
        data=Data(task="word_valence", inputs_length=14, targets_length=4),
        optimizer=Optimizer(schedule="linear", rates=("method/offset_.*=0.1",)),
        training=Training(
            steps=240, batch_size=32, eval_every=30, save_every=60, workdir="runs/adept"
        ),
    )
