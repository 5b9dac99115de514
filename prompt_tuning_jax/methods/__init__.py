"""Tuning methods: siblings, each a frozen config that attaches itself to a T5."""

from prompt_tuning_jax.methods.described import DescribedPrompts
from prompt_tuning_jax.methods.full import FullTuning, NoTuning
from prompt_tuning_jax.methods.lora import LoRA
from prompt_tuning_jax.methods.method import Attached, Context, Method, mask_of
from prompt_tuning_jax.methods.prompt import PROMPT, PromptTuning

# The name that a config or the command line types.
METHODS: dict[str, type] = {
    "prompt_tuning": PromptTuning,
    "full": FullTuning,
    "described_prompts": DescribedPrompts,
    "none": NoTuning,
    "lora": LoRA,
}

__all__ = [
    "METHODS",
    "PROMPT",
    "Attached",
    "Context",
    "DescribedPrompts",
    "FullTuning",
    "LoRA",
    "Method",
    "NoTuning",
    "PromptTuning",
    "mask_of",
]
