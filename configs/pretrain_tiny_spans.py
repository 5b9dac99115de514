"""Pre-trains the bundled tiny T5 from random weights: span corruption and prefix-LM over books.

scripts/pretrain_tiny --corpus FOLDER --dictionary FOLDER
"""

from prompt_tuning_jax.experiment import Data, Experiment, Model, Optimizer, Training
from prompt_tuning_jax.methods import FullTuning


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            name_or_path="tiny",
            random_weights=True,
            embeddings="cooccurrence",
            attention="mimetic",
            dtype="bfloat16",
            param_dtype="float32",
            dropout_rate=0.0,
        ),
        method=FullTuning(),
        data=Data(
            train="corpus",
            objectives=("span_corruption", "prefix_lm"),
            objective_weights=(0.7, 0.3),
            noise_density=0.1,
            mean_span_length=2.0,
            inputs_length=24,
            targets_length=8,
        ),
        optimizer=Optimizer(
            name="adafactor",
            multiply_by_parameter_scale=True,
            min_dim_size_to_factor=128,
            learning_rate=0.02,
            schedule="cosine",
            warmup_steps=100,
            end_learning_rate=0.001,
            weight_decay=0.0,
        ),
        training=Training(
            steps=2000,
            batch_size=128,
            eval_every=250,
            save_every=250,
            workdir="runs/pretrain_tiny_spans",
        ),
    )
