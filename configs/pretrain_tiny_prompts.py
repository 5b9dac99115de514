"""Teaches the tiny T5 to answer to prompts: questions whose classes are given as prompt vectors.

scripts/pretrain_tiny --corpus FOLDER --dictionary FOLDER
"""

from prompt_tuning_jax.experiment import Data, Experiment, Model, Optimizer, Training
from prompt_tuning_jax.methods import DescribedPrompts


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            name_or_path="runs/pretrain_tiny_spans/model",
            dtype="bfloat16",
            param_dtype="float32",
            dropout_rate=0.0,
        ),
        method=DescribedPrompts(positions=8, words=5),
        data=Data(
            train="corpus",
            dictionary="/usr/share/wordnet",
            objectives=(
                "span_corruption",
                "prefix_lm",
                "label_by_likeness",
                "label_by_topic",
                "missing_word",
                "dictionary",
            ),
            objective_weights=(0.08, 0.02, 0.45, 0.15, 0.15, 0.15),
            noise_density=0.06,
            mean_span_length=2.0,
            inputs_length=32,
            targets_length=4,
            probes=("word_valence",),
        ),
        optimizer=Optimizer(
            name="adafactor",
            multiply_by_parameter_scale=True,
            min_dim_size_to_factor=128,
            learning_rate=0.015,
            schedule="linear",
            warmup_steps=50,
            weight_decay=0.0,
        ),
        training=Training(
            seeds=(1,),  # not an earlier stage's: its examples would come again, and be known
            steps=6000,
            batch_size=160,
            eval_every=500,
            save_every=250,
            workdir="runs/pretrain_tiny_prompts",
        ),
    )
