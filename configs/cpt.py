"""Context-aware prompt tuning of SmolLM2-135M-Instruct: labeled examples, changed by training.

python scripts/fetch_model smollm2
prompt-tuning train configs/cpt.py --data train.jsonl --eval_data dev.jsonl

The examples come from the training data, and those that fit 256 tokens are used.
"""

from prompt_tuning_jax.config.experiment import Data, Experiment, Model, Optimizer, Training
from prompt_tuning_jax.config.methods import CPT


def get_config() -> Experiment:
    return Experiment(
        model=Model(name_or_path="smollm2", dtype="bfloat16", dropout_rate=0.0),
        method=CPT(shots=8, length=256),
        data=Data(
            task="",
            train="train.jsonl",
            eval="dev.jsonl",
            inputs_template="{inputs}\nLabel: ",
            inputs_length=128,
            max_eval_examples=500,
        ),
        optimizer=Optimizer(learning_rate=0.001, weight_decay=0.0, schedule="linear"),
        training=Training(
            steps=240, batch_size=16, eval_every=40, save_every=40, workdir="runs/cpt"
        ),
    )
