"""Prompt tuning: a trained prompt at the encoder's input (Lester et al. 2021)."""

from dataclasses import dataclass, replace
from typing import Literal

import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax.methods.base import Context, Method, TunedModel, TuningModule
from prompt_tuning_jax.methods.prompt_combine import Placement, attention_mask, combine
from prompt_tuning_jax.methods.prompt_init import Init, initial_prompt
from prompt_tuning_jax.models.injections import Injections
from prompt_tuning_jax.models.t5.model import T5
from prompt_tuning_jax.typing import Array, HostArray

PROMPT = "method/prompt_PD"


@dataclass(frozen=True, kw_only=True)
class PromptTuning(Method):
    """``length * D`` parameters: ``method/prompt_PD``, float32, at the encoder's input only.

    ``init_labels`` replaces the task's labels; ``init_population`` is how many of the most common
    pieces are drawn from (0: all).  The attention fields take sight away: ``prompt_to_input`` and
    ``input_to_prompt`` are query -> key.
    """

    length: int = 100
    init: Init = "class_labels"
    init_labels: tuple[str, ...] = ()
    init_text: str = ""
    init_path: str = ""
    init_population: int = 5000
    placement: Placement = "prefix"
    prompt_to_input: bool = True
    prompt_to_prompt: Literal["all", "causal", "none"] = "all"
    input_to_prompt: bool = True

    def attach(self, model: T5, *, key: Array, context: Context) -> TunedModel:
        prompt_PD = initial_prompt(
            self.init,
            key=key,
            embedding_VD=model.token_embedder.table(),
            length=self.length,
            vocabulary=context.vocabulary,
            labels=self.init_labels or context.labels,
            text=self.init_text,
            path=self.init_path,
            population=self.init_population,
        )
        return self.with_prompt(model, prompt_PD)

    def with_prompt(self, model: T5, prompt: Array) -> TunedModel:
        """The model with this prompt, ``[P, D]`` or one per example ``[B, P, D]``."""
        return TunedModel(model, Prompt(prompt, config=self))

    def trains(self, name: str) -> bool:
        return name == PROMPT

    def prompt_positions(self) -> int:
        return self.length

    def for_inference(self, attached: TunedModel) -> tuple[Method, TunedModel]:
        # How it began no longer matters, and would ask for a vocabulary.
        return replace(self, init="uniform", init_labels=(), init_text="", init_path=""), attached


class Prompt(TuningModule):
    """Holds ``prompt_PD`` and puts it into the encoder's input."""

    def __init__(self, prompt: Array, *, config: PromptTuning):
        value = jnp.asarray(prompt, jnp.float32)
        self.prompt_PD = nnx.Param(value, logical_axes=("prompt", "prompt_embed"))
        self.config = config

    def injections(
        self,
        model: T5,
        tokens_BT: Array | HostArray,
        *,
        task_B: Array | HostArray | None = None,
        key: Array | None = None,
    ) -> Injections:
        config = self.config
        source, is_prompt_BU = combine(
            self.prompt_PD.get_value(),
            model.embed(tokens_BT),
            tokens_BT,
            placement=config.placement,
            eos_id=model.input_eos,
        )
        seen_BUU = attention_mask(
            is_prompt_BU,
            prompt_to_input=config.prompt_to_input,
            prompt_to_prompt=config.prompt_to_prompt,
            input_to_prompt=config.input_to_prompt,
        )
        return Injections(encoder_input=replace(source, attention_mask_BUU=seen_BUU))
