"""A prompt for Gemma 3 270M, a decoder-only language model, on your own data.

python scripts/fetch_model gemma3-270m
prompt-tuning train configs/gemma3_270m.py --data train.jsonl --eval_data dev.jsonl
"""

from prompt_tuning_jax.config.experiment import Data, Experiment, Model, Optimizer, Training
from prompt_tuning_jax.config.methods import PromptTuning


def get_config() -> Experiment:
    return Experiment(
        model=Model(name_or_path="gemma3-270m", dtype="bfloat16", dropout_rate=0.0),
        method=PromptTuning(length=20, init="sampled_vocabulary"),
        data=Data(
            task="",
            train="train.jsonl",
            eval="dev.jsonl",
            # The model continues the input, so the input ends where the answer begins.
            inputs_template="{inputs}\nLabel: ",
            inputs_length=128,
            max_eval_examples=500,
        ),
        # A prompt is in the space of scaled embeddings, whose numbers are about 1.
        optimizer=Optimizer(learning_rate=0.3, weight_decay=0.0),
        training=Training(
            steps=240,
            batch_size=16,
            eval_every=40,
            save_every=40,
            workdir="runs/gemma3_270m",
        ),
    )
