"""The families that are read and written, by their ``model_type``; T5s are read elsewhere.

A family is a function that describes its ``config.json`` and a table of its tensors' names.
"""

from prompt_tuning_jax.checkpoints.hf.families.base import Family
from prompt_tuning_jax.checkpoints.hf.families.gemma import GEMMA2, GEMMA3, GEMMA3_TEXT
from prompt_tuning_jax.checkpoints.hf.families.gpt import BLOOM, GPT2, GPT_NEOX, OPT, PHI
from prompt_tuning_jax.checkpoints.hf.families.llama import LLAMA, MISTRAL, OLMO, QWEN2, QWEN3
from prompt_tuning_jax.checkpoints.hf.families.t5gemma import T5GEMMA, T5GEMMA2, T5GemmaFamily

# Decoder-only models.
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
T5GEMMA_FAMILIES: dict[str, T5GemmaFamily] = {"t5gemma": T5GEMMA, "t5gemma2": T5GEMMA2}
