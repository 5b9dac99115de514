"""Model tuning of the bundled tiny T5 on the quickstart's task, as a baseline for prompts.

prompt-tuning train configs/model_tuning.py

The optimizer is that of T5's fine-tuning (Raffel et al. 2020, section 3.1.2): Adafactor with
parameter scaling and a constant learning rate of 0.001.
"""

from prompt_tuning_jax.config.experiment import Data, Experiment, Model, Optimizer, Training
from prompt_tuning_jax.config.methods import FullTuning


def get_config() -> Experiment:
    return Experiment(
        model=Model(name_or_path="tiny", dtype="bfloat16", param_dtype="float32", dropout_rate=0.0),
        method=FullTuning(),
        data=Data(task="word_valence", inputs_length=14, targets_length=4),
        optimizer=Optimizer(
            learning_rate=1e-3,
            multiply_by_parameter_scale=True,
            min_dim_size_to_factor=128,
            weight_decay=0.0,
        ),
        training=Training(
            steps=400,
            batch_size=32,
            eval_every=100,
            save_every=100,
            workdir="runs/model_tuning",
        ),
    )
