"""LLaMA-Adapter for SmolLM2-135M-Instruct: gated prompts in the attention of every layer.

python scripts/fetch_model smollm2
prompt-tuning train configs/adaption_prompt.py --data train.jsonl --eval_data dev.jsonl
"""

from prompt_tuning_jax.config.experiment import Data, Experiment, Model, Optimizer, Training
from prompt_tuning_jax.config.methods import AdaptionPrompt


def get_config() -> Experiment:
    return Experiment(
        model=Model(name_or_path="smollm2", dtype="bfloat16", dropout_rate=0.0),
        method=AdaptionPrompt(length=10),
        data=Data(
            task="",
            train="train.jsonl",
            eval="dev.jsonl",
            inputs_template="{inputs}\nAnswer: ",
            inputs_length=128,
            max_eval_examples=500,
        ),
        optimizer=Optimizer(learning_rate=0.03, weight_decay=0.0, schedule="linear"),
        training=Training(
            steps=240, batch_size=16, eval_every=40, save_every=40, workdir="runs/adaption_prompt"
        ),
    )
