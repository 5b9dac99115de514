"""LM adaptation of the pre-trained tiny T5 with prefix LM (Lester et al. 2021, section 3.3).

python scripts/pretrain_tiny --corpus FOLDER --dictionary FOLDER --lm_adapt
"""

from prompt_tuning_jax.config.experiment import Data, Experiment, Model, Optimizer, Training
from prompt_tuning_jax.config.methods import FullTuning


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            name_or_path="runs/pretrain_tiny/model",
            dtype="bfloat16",
            param_dtype="float32",
            dropout_rate=0.0,
        ),
        method=FullTuning(),
        data=Data(train="corpus", objectives=("prefix_lm",), inputs_length=48, targets_length=8),
        optimizer=Optimizer(
            name="adafactor",
            multiply_by_parameter_scale=True,
            min_dim_size_to_factor=128,
            learning_rate=0.005,
            schedule="cosine",
            warmup_steps=20,
            weight_decay=0.0,
        ),
        training=Training(
            seeds=(2,),  # not an earlier stage's: its examples would come again, and be known
            steps=400,
            batch_size=64,
            eval_every=100,
            save_every=100,
            workdir="runs/lm_adapt_tiny",
        ),
    )
