"""The settings of Lester et al. 2021 (section 3, appendix A) on BoolQ.

prompt-tuning train configs/paper.py --data_dir DATA

DATA is a folder of official files or of TFDS.  The model is read from the bucket where it was
released, or from the folder given by ``--model``.  ``--set data.task=NAME`` selects another task,
and ``--seeds 0,1,2,3,4`` trains the paper's ensemble of five.
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
        model=Model(name_or_path="t5_1_1_lm100k_base", dtype="bfloat16"),
        method=PromptTuning(length=100, init="class_labels", init_population=5000),
        data=Data(
            task="taskless_super_glue_boolq_v102_examples",
            inputs_length=512,
            targets_length=8,
        ),
        optimizer=Optimizer(
            name="adafactor",
            learning_rate=0.3,
            weight_decay=1e-5,
            decay_rate=0.8,
            multiply_by_parameter_scale=False,
        ),
        training=Training(steps=30_000, batch_size=32, workdir="runs/paper"),
        evaluation=Evaluation(strategy="greedy"),
    )
