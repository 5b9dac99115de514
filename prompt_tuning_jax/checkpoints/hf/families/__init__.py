"""The families of decoder-only models that are read and written, by their ``model_type``.

A family is a function that describes its ``config.json`` and a table of its tensors' names.
"""

from prompt_tuning_jax.checkpoints.hf.families.base import Family
from prompt_tuning_jax.checkpoints.hf.families.gemma import GEMMA2, GEMMA3, GEMMA3_TEXT
from prompt_tuning_jax.checkpoints.hf.families.gpt import BLOOM, GPT2, GPT_NEOX, OPT, PHI
from prompt_tuning_jax.checkpoints.hf.families.llama import LLAMA, MISTRAL, OLMO, QWEN2, QWEN3

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "olmo": OLMO,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3_TEXT,
    "gemma3": GEMMA3,
    "gpt2": GPT2,
    "bloom": BLOOM,
    "gpt_neox": GPT_NEOX,
    "opt": OPT,
    "phi": PHI,
}
