"""A cartridge for SmolLM2-135M-Instruct: keys and values that start as those of a text.

python scripts/fetch_model smollm2
prompt-tuning train configs/cartridge.py --data train.jsonl --eval_data dev.jsonl

With ``--set method.init=text --set method.init_path=manual.txt``, the cartridge starts as the first
128 tokens of the file, and the rows of the data may be questions about it and their answers.
"""

from prompt_tuning_jax.config.experiment import Data, Experiment, Model, Optimizer, Training
from prompt_tuning_jax.config.methods import Cartridge


def get_config() -> Experiment:
    return Experiment(
        model=Model(name_or_path="smollm2", dtype="bfloat16", dropout_rate=0.0),
        method=Cartridge(length=128),
        data=Data(
            task="",
            train="train.jsonl",
            eval="dev.jsonl",
            inputs_template="{inputs}\nAnswer: ",
            inputs_length=128,
            max_eval_examples=500,
        ),
        optimizer=Optimizer(learning_rate=0.01, weight_decay=0.0, schedule="linear"),
        training=Training(
            steps=240, batch_size=16, eval_every=40, save_every=40, workdir="runs/cartridge"
        ),
    )
