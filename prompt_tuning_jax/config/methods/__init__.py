"""The tuning methods as data: a dataclass of hyper-parameters for each, and their names.

A method's implementation is the ``TuningModule`` that ``implementation`` names.  It is imported
when the method is attached to a model (``methods.attach_method``).
"""

from prompt_tuning_jax.config.methods.base import (
    Init,
    MethodConfig,
    PromptAttention,
    is_attached,
    split_init,
)
from prompt_tuning_jax.config.methods.baselines import NoTuning, PromptDesign
from prompt_tuning_jax.config.methods.layers import (
    CPT,
    AdaptionPrompt,
    Cartridge,
    DeepPrompts,
    PrefixTuning,
)
from prompt_tuning_jax.config.methods.prompts import (
    PLACEMENTS,
    WARP,
    ADePT,
    Combine,
    DePT,
    DescribedPrompts,
    MultitaskInit,
    MultitaskPrompts,
    Placement,
    PromptTuning,
    PTuning,
    ResidualPrompt,
    SuperPosPrompt,
)
from prompt_tuning_jax.config.methods.weights import IA3, Adapters, FullTuning, LoRA, PatternTuning

__all__ = [
    "CPT",
    "IA3",
    "METHODS",
    "PLACEMENTS",
    "WARP",
    "ADePT",
    "Adapters",
    "AdaptionPrompt",
    "Cartridge",
    "Combine",
    "DePT",
    "DeepPrompts",
    "DescribedPrompts",
    "FullTuning",
    "Init",
    "LoRA",
    "MethodConfig",
    "MultitaskInit",
    "MultitaskPrompts",
    "NoTuning",
    "PTuning",
    "PatternTuning",
    "Placement",
    "PrefixTuning",
    "PromptAttention",
    "PromptDesign",
    "PromptTuning",
    "ResidualPrompt",
    "SuperPosPrompt",
    "is_attached",
    "method_name",
    "split_init",
]

# The name that a config file, ``--set method=NAME`` and gin use.
METHODS: dict[str, type[MethodConfig]] = {
    "prompt_tuning": PromptTuning,
    "prefix_tuning": PrefixTuning,
    "cartridge": Cartridge,
    "cpt": CPT,
    "p_tuning": PTuning,
    "residual_prompt": ResidualPrompt,
    "superpos_prompt": SuperPosPrompt,
    "dept": DePT,
    "adept": ADePT,
    "deep_prompts": DeepPrompts,
    "adaption_prompt": AdaptionPrompt,
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


def method_name(method: MethodConfig) -> str:
    """Returns the name of a method in ``METHODS``."""
    return next(name for name, cls in METHODS.items() if cls is type(method))
