"""Visual prompt tuning (VPT-deep, Jia et al. 2022): prompts in every layer of a vision transformer.

prompt-tuning train configs/vpt.py --data images/train --eval_data images/eval --workdir runs/vpt

Images are in a folder with a folder for each class, or in IDX or npz files.  For another model, add
``--set model.name_or_path=google/vit-base-patch16-224``.  VPT-shallow is ``method=prompt_tuning``,
and a linear probe is ``method=pattern`` with ``method.patterns=classifier/.*``.  Every method
trains the classifier, too.
"""

from prompt_tuning_jax.config.experiment import (
    Data,
    Evaluation,
    Experiment,
    Model,
    Optimizer,
    Training,
)
from prompt_tuning_jax.config.methods import DeepPrompts


def get_config() -> Experiment:
    return Experiment(
        model=Model(name_or_path="vit_fashion", dropout_rate=0.0),
        method=DeepPrompts(length=10, init="xavier_uniform", dropout=0.1),
        data=Data(task="", train="images/train", eval="images/eval"),
        optimizer=Optimizer(
            name="sgd",
            momentum=0.9,
            learning_rate=0.5,
            schedule="cosine",
            warmup_steps=100,
            weight_decay=0.0,
        ),
        training=Training(steps=1000, batch_size=64, eval_every=100, save_every=100),
        evaluation=Evaluation(batch_size=128),
    )
