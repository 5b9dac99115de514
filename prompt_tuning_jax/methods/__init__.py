"""Tuning methods: siblings, each a frozen config that attaches itself to a T5."""

from prompt_tuning_jax.config.base import Config
from prompt_tuning_jax.methods.adapters import Adapters
from prompt_tuning_jax.methods.base import Context, Known, Method, TunedModel, trainable_mask
from prompt_tuning_jax.methods.deep import DeepPrompts
from prompt_tuning_jax.methods.described_prompts import DescribedPrompts
from prompt_tuning_jax.methods.full import FullTuning, NoTuning
from prompt_tuning_jax.methods.ia3 import IA3
from prompt_tuning_jax.methods.lora import LoRA
from prompt_tuning_jax.methods.multitask import MultitaskPrompts
from prompt_tuning_jax.methods.p_tuning import PTuning
from prompt_tuning_jax.methods.pattern import PatternTuning
from prompt_tuning_jax.methods.prefix import PrefixTuning
from prompt_tuning_jax.methods.prompt import PROMPT, PromptTuning
from prompt_tuning_jax.methods.prompt_design import PromptDesign
from prompt_tuning_jax.methods.warp import WARP

# The name that a config or the command line types.
METHODS: dict[str, type[Method]] = {
    "prompt_tuning": PromptTuning,
    "prefix_tuning": PrefixTuning,
    "p_tuning": PTuning,
    "deep_prompts": DeepPrompts,
    "warp": WARP,
    "multitask_prompts": MultitaskPrompts,
    "full": FullTuning,
    "described_prompts": DescribedPrompts,
    "none": NoTuning,
    "prompt_design": PromptDesign,
    "lora": LoRA,
    "ia3": IA3,
    "adapters": Adapters,
    "pattern": PatternTuning,
}


def method_name(method: Method) -> str:
    """What a config and the command line call it."""
    return next(name for name, kind in METHODS.items() if kind is type(method))


__all__ = [
    "IA3",
    "METHODS",
    "PROMPT",
    "WARP",
    "Adapters",
    "Config",
    "Context",
    "DeepPrompts",
    "DescribedPrompts",
    "FullTuning",
    "Known",
    "LoRA",
    "Method",
    "MultitaskPrompts",
    "NoTuning",
    "PTuning",
    "PatternTuning",
    "PrefixTuning",
    "PromptDesign",
    "PromptTuning",
    "TunedModel",
    "method_name",
    "trainable_mask",
]
