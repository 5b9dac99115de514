"""WARP: prompt vectors in the input, class vectors at the output (Hambardzumyan et al. 2021)."""

from dataclasses import replace

import jax.numpy as jnp

from prompt_tuning_jax.config.methods import WARP
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods.base import Context, LabelTokens, TunedModel, TuningModule
from prompt_tuning_jax.methods.dense import small_param
from prompt_tuning_jax.methods.prompt_init import init_prompt
from prompt_tuning_jax.methods.template import Placed, place, put, vectors
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.models.injections import NO_INJECTIONS, Injections
from prompt_tuning_jax.models.ops import matmul
from prompt_tuning_jax.typing import Array, HostArray


class ClassVectors(TuningModule[WARP]):
    """Inserts the prompt into the input and scores the labels with class vectors."""

    def __init__(
        self,
        config: WARP,
        prompt_PD: Array | None,
        class_CD: Array,
        *,
        placed: Placed,
        labels: LabelTokens,
    ):
        super().__init__(config)
        self.placed = placed
        self.labels = labels
        if prompt_PD is not None:
            self.prompt_PD = small_param(prompt_PD, "prompt", "prompt_embed")
        self.class_CD = small_param(class_CD, None, "prompt_embed")

    @classmethod
    def attach(cls, config: WARP, model: Model, *, key: Array, context: Context) -> TunedModel:
        vocabulary = context.vocabulary or model.vocabulary
        if not context.labels or vocabulary is None:
            raise UserError(
                "method=warp scores labels: set data.labels if the task has none, and "
                "model.vocabulary if the model has no vocabulary"
            )
        labels = tuple(map(tuple, vocabulary.encode_targets(context.labels)))
        for label, tokens in zip(context.labels, labels, strict=True):
            if len(tokens) == 1 or labels.count(tokens) > 1:
                raise UserError(
                    f"method=warp: the label {label!r} has no tokens, or those of another label; "
                    "change it in data.labels"
                )
        template = config.parsed_template()
        prompt_PD = None
        if template.prompt_length:
            prompt_PD = init_prompt(
                config,
                model,
                key=key,
                length=template.prompt_length,
                context=replace(context, vocabulary=vocabulary),
            )
        class_CD = model.output_vectors(jnp.asarray([tokens[0] for tokens in labels]))
        placed = place(template, vocabulary)
        return TunedModel(model, cls(config, prompt_PD, class_CD, placed=placed, labels=labels))

    @property
    def label_tokens(self) -> LabelTokens:
        return self.labels

    def label_logits(self, hidden_BD: Array) -> Array:
        return matmul.dot(hidden_BD, self.class_CD.get_value().T, dtype=jnp.float32)

    def injections(
        self,
        model: Model,
        tokens_BT: Array | HostArray,
        *,
        task_B: Array | HostArray | None = None,
        key: Array | None = None,
    ) -> Injections:
        if not self.placed.anchors:
            return NO_INJECTIONS
        empty_PD = jnp.zeros((0, model.config.embed_dim), jnp.float32)
        has_prompt = hasattr(self, "prompt_PD")
        prompt_PD = self.prompt_PD.get_value() if has_prompt else empty_PD
        all_AD = vectors(self.placed, prompt_PD, model)
        source = model.embed(tokens_BT)
        return Injections(
            model_input=put(all_AD, source, tokens_BT, self.placed.behind, eos_id=model.input_eos)
        )
