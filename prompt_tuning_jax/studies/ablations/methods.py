"""The methods that an ablation compares, with their optimizers and learning rates to try."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from prompt_tuning_jax.config.experiment import Optimizer
from prompt_tuning_jax.methods import (
    IA3,
    WARP,
    Adapters,
    ADePT,
    Cartridge,
    DeepPrompts,
    DePT,
    FullTuning,
    LoRA,
    MethodConfig,
    MultitaskPrompts,
    NoTuning,
    PatternTuning,
    PrefixTuning,
    PromptDesign,
    PromptTuning,
    PTuning,
    ResidualPrompt,
    SuperPosPrompt,
)

# Adafactor as in the paper; AdamW as in the papers of the methods that adapt the weights.
ADAFACTOR = Optimizer(schedule="linear")
ADAMW = Optimizer(name="adamw", schedule="linear", weight_decay=0.0)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A method, its optimizer, and the learning rates to try."""

    method: MethodConfig
    optimizer: Optimizer = field(default_factory=Optimizer)
    rates: tuple[float, ...] = ()


def compared(*, length: int, init: str) -> dict[str, Compared]:
    """Returns the methods by name; ``length`` and ``init`` apply to all prompts."""
    start: dict[str, Any] = {"init": init, "length": length}
    # The rates include one above the usual choice.
    prompts = (0.1, 0.3, 1.0)
    around = (3e-3, 1e-2, 3e-2)

    def prompt(method: MethodConfig, rates: tuple[float, ...] = prompts) -> Compared:
        return Compared(method=method, optimizer=ADAFACTOR, rates=rates)

    def two_rates(method: MethodConfig) -> Compared:
        """Returns a prompt and other arrays, which by default have a lower learning rate."""
        optimizer = dataclasses.replace(ADAFACTOR, rates=method.default_optimizer["rates"])
        method = dataclasses.replace(method, **start)
        return Compared(method=method, optimizer=optimizer, rates=prompts)

    def weights(method: MethodConfig, rates: tuple[float, ...] = around) -> Compared:
        return Compared(method=method, optimizer=ADAMW, rates=rates)

    return {
        "none": Compared(method=NoTuning()),
        "prompt_design": Compared(method=PromptDesign()),
        "prompt_tuning": prompt(dataclasses.replace(PromptTuning(), **start)),
        "multitask_prompts": prompt(dataclasses.replace(MultitaskPrompts(), **start)),
        "deep_prompts": prompt(dataclasses.replace(DeepPrompts(), **start), (0.03, 0.1, 0.3)),
        # Class vectors have a good initial value, and so a learning rate a hundred times lower.
        "warp": two_rates(WARP()),
        "p_tuning": weights(PTuning(length=length), (1e-3, 3e-3, 1e-2)),
        "residual_prompt": two_rates(ResidualPrompt()),
        "superpos_prompt": prompt(SuperPosPrompt(length=length), (1e-2, 3e-2, 1e-1)),
        "dept": two_rates(DePT()),
        "adept": two_rates(ADePT()),
        # Lower rates, because prefixes are initialized from words (configs/prefix_tuning.py).
        "prefix_tuning": prompt(PrefixTuning(length=length), (0.03, 0.1, 0.3)),
        "cartridge": prompt(Cartridge(length=length), (0.03, 0.1, 0.3)),
        "ia3": weights(IA3(), (1e-1, 3e-1, 1.0)),
        "lora": weights(LoRA()),
        "adapters": weights(Adapters(), (1e-3, 3e-3, 1e-2)),
        "pattern": weights(PatternTuning(), (3e-2, 1e-1, 3e-1)),
        "full": weights(FullTuning(), (3e-4, 1e-3, 3e-3)),
    }
