"""LM adaptation of the pre-trained tiny T5 (Lester et al. 2021, section 3.3): prefix-LM alone.

scripts/pretrain_tiny --corpus FOLDER
"""

from prompt_tuning_jax.experiment import Data, Experiment, Model, Optimizer, Training
from prompt_tuning_jax.methods import FullTuning


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            name_or_path="runs/pretrain_tiny/model",
            dtype="bfloat16",
            param_dtype="float32",
            dropout_rate=0.0,
        ),
        method=FullTuning(),
        data=Data(train="corpus", objectives=("prefix_lm",), inputs_length=64, targets_length=32),
        optimizer=Optimizer(
            name="adamw",
            learning_rate=5e-4,
            schedule="cosine",
            warmup_steps=50,
            weight_decay=0.0,
            gradient_clip_norm=1.0,
        ),
        training=Training(
            steps=800,
            batch_size=32,
            eval_every=200,
            save_every=200,
            workdir="runs/lm_adapt_tiny",
        ),
    )
