"""Five prompts at once on the bundled tiny T5: is a word positive or negative?  Takes minutes.

prompt-tuning train configs/quickstart.py
"""

from prompt_tuning_jax.experiment import Data, Experiment, Model, Optimizer, Training
from prompt_tuning_jax.methods import PromptTuning


def get_config() -> Experiment:
    return Experiment(
        model=Model(name_or_path="tiny", dtype="bfloat16", param_dtype="float32", dropout_rate=0.0),
        method=PromptTuning(length=10, init="class_labels"),
        data=Data(task="word_valence", inputs_length=14, targets_length=4),
        optimizer=Optimizer(schedule="linear"),
        training=Training(
            steps=250,
            batch_size=16,
            seeds=(0, 1, 2, 3, 4),
            eval_every=50,
            save_every=50,
            workdir="runs/quickstart",
        ),
    )
