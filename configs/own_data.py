"""A prompt for your own data: rows with the columns inputs and targets, as jsonl, csv or parquet.

prompt-tuning train configs/own_data.py --data train.jsonl --eval_data dev.jsonl --workdir runs/mine

Use other columns with ``--set data.inputs_column=sentence``, or several columns with
``--set data.inputs_template='premise: {premise} hypothesis: {hypothesis}'``.
"""

from prompt_tuning_jax.config.experiment import Data, Experiment, Model, Training
from prompt_tuning_jax.config.methods import PromptTuning


def get_config() -> Experiment:
    return Experiment(
        model=Model(name_or_path="tiny"),
        method=PromptTuning(length=20, init="class_labels"),
        # The files replace the default task.
        data=Data(task="", train="train.jsonl", eval="dev.jsonl", inputs_length=128),
        training=Training(
            steps=1000,
            batch_size=32,
            eval_every=100,
            save_every=100,
            workdir="runs/own_data",
        ),
    )
