"""Five prompts at once on the bundled tiny T5: is a word positive or negative?  Takes minutes.

prompt-tuning train configs/quickstart.py
"""

from prompt_tuning_jax.experiment import Data, Experiment, Model, Training
from prompt_tuning_jax.methods import PromptTuning


def get_config() -> Experiment:
    return Experiment(
        model=Model(name_or_path="tiny"),
        method=PromptTuning(length=20, init="class_labels"),
        data=Data(task="word_valence", inputs_length=16, targets_length=4),
        training=Training(
            steps=400,
            batch_size=32,
            seeds=(0, 1, 2, 3, 4),
            eval_every=100,
            save_every=100,
            workdir="runs/quickstart",
        ),
    )
