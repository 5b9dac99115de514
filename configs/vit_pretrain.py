"""Pre-train a small vision transformer on labeled images, from random weights.

prompt-tuning train configs/vit_pretrain.py --workdir runs/vit_pretrain

Fashion-MNIST is in Debian's package ``dataset-fashion-mnist``.  ``prompt-tuning merge`` then writes
the run as a Hugging Face folder, such as ``vit_fashion``, which configs/vpt.py tunes.
"""

from prompt_tuning_jax.config.experiment import (
    Data,
    Evaluation,
    Experiment,
    Model,
    Optimizer,
    Training,
)
from prompt_tuning_jax.config.methods import FullTuning

FOLDER = "/usr/share/datasets/fashion-mnist"


def get_config() -> Experiment:
    return Experiment(
        model=Model(name_or_path="vit_tiny", random_weights=True, dropout_rate=0.0),
        method=FullTuning(),
        data=Data(
            task="",
            train=f"{FOLDER}/train-images-idx3-ubyte.gz",
            eval=f"{FOLDER}/t10k-images-idx3-ubyte.gz",
            augment=("flip", "crop"),
        ),
        optimizer=Optimizer(
            name="adamw",
            learning_rate=1e-3,
            schedule="cosine",
            warmup_steps=200,
            weight_decay=0.05,
        ),
        training=Training(steps=6000, batch_size=128, eval_every=1000, save_every=1000),
        evaluation=Evaluation(batch_size=512),
    )
