"""The prompt-tuning configs released in 2021 (google-research/prompt-tuning), its SST-2 demo.

prompt-tuning train configs/released.py --data_dir DATA

DATA is a folder of official files or of TFDS; the model is read from the bucket where it was
released, or from the folder named by ``--model``.
Unlike the paper: batches of 128, the loss summed over tokens with z-loss, and an optimizer that
goes on counting at the step of the restored checkpoint, which holds nearly every update at an
RMS of 0.3.  TRAIN_STEPS there includes those 1,100,000 steps; ``training.steps`` does not.
"""

from prompt_tuning_jax.config.experiment import (
    Data,
    Evaluation,
    Experiment,
    Model,
    Optimizer,
    Training,
)
from prompt_tuning_jax.config.methods import PromptTuning


def get_config() -> Experiment:
    return Experiment(
        model=Model(name_or_path="t5_1_1_lm100k_base", dtype="bfloat16", dropout_rate=0.1),
        method=PromptTuning(length=100, init="class_labels", init_population=5000),
        data=Data(
            task="taskless_glue_sst2_v200_examples",
            inputs_length=512,
            targets_length=8,
        ),
        optimizer=Optimizer(
            name="adafactor",
            learning_rate=0.3,
            weight_decay=1e-5,
            decay_rate=0.8,
            clipping_threshold=1.0,
            multiply_by_parameter_scale=False,
            min_dim_size_to_factor=128,
            initial_step=1_100_000,
        ),
        training=Training(
            steps=50_000,
            batch_size=128,
            loss_normalization="sum",
            z_loss=1e-4,
            workdir="runs/released",
        ),
        evaluation=Evaluation(strategy="greedy"),
    )
