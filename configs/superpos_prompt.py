"""SuperPos-Prompt of the bundled tiny T5 on the quickstart's task: mixtures of 128 tokens.

prompt-tuning train configs/superpos_prompt.py

The weights of tokens need a lower learning rate than a prompt.  The run saves a plain prompt.
"""

from prompt_tuning_jax.config.experiment import Data, Experiment, Model, Optimizer, Training
from prompt_tuning_jax.config.methods import SuperPosPrompt


def get_config() -> Experiment:
    return Experiment(
        model=Model(name_or_path="tiny", dtype="bfloat16", param_dtype="float32", dropout_rate=0.0),
        method=SuperPosPrompt(length=20),
        data=Data(task="word_valence", inputs_length=14, targets_length=4),
        optimizer=Optimizer(learning_rate=0.03, schedule="linear"),
        training=Training(
            steps=240, batch_size=32, eval_every=30, save_every=60, workdir="runs/superpos_prompt"
        ),
    )
