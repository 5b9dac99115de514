"""Pre-trains the bundled tiny T5 from random weights, on text and on classes that prompts describe.

python scripts/pretrain_tiny --corpus FOLDER --dictionary FOLDER
"""

from prompt_tuning_jax.config.experiment import Data, Experiment, Model, Optimizer, Training
from prompt_tuning_jax.config.methods import DescribedPrompts


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            name_or_path="tiny",
            random_weights=True,
            embeddings="cooccurrence",
            attention_init="matching",
            dtype="bfloat16",
            param_dtype="float32",
            dropout_rate=0.0,
        ),
        method=DescribedPrompts(positions=8, words=6),
        data=Data(
            train="corpus",
            dictionary="/usr/share/wordnet",
            objectives=(
                "span_corruption",
                "prefix_lm",
                "label_by_similarity",
                "label_by_keyword",
                "label_by_topic",
                "missing_word",
                "dictionary",
            ),
            objective_weights=(0.10, 0.02, 0.40, 0.15, 0.08, 0.10, 0.15),
            noise_density=0.08,
            mean_span_length=2.0,
            inputs_length=26,
            targets_length=4,
            probes=("word_valence",),
        ),
        optimizer=Optimizer(
            name="adafactor",
            multiply_by_parameter_scale=True,
            min_dim_size_to_factor=128,
            learning_rate=0.02,
            schedule="linear",
            warmup_steps=50,
            weight_decay=0.0,
        ),
        training=Training(
            steps=3750,
            batch_size=192,
            eval_every=250,
            save_every=250,
            workdir="runs/pretrain_tiny",
        ),
    )
