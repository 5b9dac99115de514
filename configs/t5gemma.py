"""A prompt for T5Gemma 2B-2B, an encoder-decoder of Gemma 2's layers, on your own data.

prompt-tuning train configs/t5gemma.py --data train.jsonl --eval_data dev.jsonl
"""

from prompt_tuning_jax.config.experiment import Data, Experiment, Model, Optimizer, Training
from prompt_tuning_jax.config.methods import PromptTuning


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            name_or_path="google/t5gemma-2b-2b-prefixlm",
            dtype="bfloat16",
            param_dtype="bfloat16",
            dropout_rate=0.0,
        ),
        method=PromptTuning(length=50, init="sampled_vocabulary"),
        data=Data(
            task="",
            train="train.jsonl",
            eval="dev.jsonl",
            inputs_length=512,
            targets_length=32,
        ),
        # Prompts are in the space of the scaled embeddings, which are smaller than T5's.
        optimizer=Optimizer(learning_rate=0.1, weight_decay=0.0),
        training=Training(
            steps=1000,
            batch_size=32,
            eval_every=100,
            save_every=100,
            remat="full",
            workdir="runs/t5gemma",
        ),
    )
