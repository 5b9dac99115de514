"""The configs released in 2021 (google-research/prompt-tuning), with the task of its demo, SST-2.

prompt-tuning train configs/released.py --data_dir DATA

DATA is a folder of official files or of TFDS.  The model is read from the bucket where it was
released, or from the folder given by ``--model``.

These configs differ from the paper: batches have 128 examples, the loss is summed over tokens with
z-loss, and the optimizer continues to count from the step of the restored checkpoint, so that
nearly every update has an RMS of 0.3.  Their TRAIN_STEPS includes those 1,100,000 steps;
``training.steps`` does not.
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
