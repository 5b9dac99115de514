"""Pre-trains the bundled tiny T5 from random weights: span corruption and prefix-LM over books.

scripts/pretrain_tiny --corpus FOLDER
"""

from prompt_tuning_jax.experiment import Data, Experiment, Model, Optimizer, Training
from prompt_tuning_jax.methods import FullTuning


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            name_or_path="tiny",
            random_weights=True,
            embeddings="cooccurrence",
            dtype="bfloat16",
            param_dtype="float32",
            dropout_rate=0.0,
        ),
        method=FullTuning(),
        data=Data(
            train="corpus",
            objectives=("span_corruption", "prefix_lm"),
            objective_weights=(0.75, 0.25),
            noise_density=0.25,
            inputs_length=64,
            targets_length=32,
        ),
        optimizer=Optimizer(
            name="adamw",
            learning_rate=1.5e-3,
            schedule="cosine",
            warmup_steps=300,
            end_learning_rate=1e-4,
            weight_decay=0.0,
            gradient_clip_norm=1.0,
        ),
        training=Training(
            steps=4500,
            batch_size=32,
            eval_every=500,
            save_every=500,
            workdir="runs/pretrain_tiny",
        ),
    )
