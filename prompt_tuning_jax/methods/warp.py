"""WARP: prompt tokens in the input, class vectors at the output (Hambardzumyan et al. 2021)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods.base import Context, LabelTokens, Method, TunedModel, TuningModule
from prompt_tuning_jax.methods.dense import small_param
from prompt_tuning_jax.methods.prompt_init import Init, initial_prompt
from prompt_tuning_jax.methods.template import Placed, Template, parse_template, place, put, vectors
from prompt_tuning_jax.models.injections import NO_INJECTIONS, Injections
from prompt_tuning_jax.models.ops import matmul
from prompt_tuning_jax.models.t5.model import T5
from prompt_tuning_jax.typing import Array, HostArray


@dataclass(frozen=True, kw_only=True)
class WARP(Method):
    """``(P + C) * D`` parameters: P prompt vectors, and a vector for each of the C labels.

    ``template`` says where prompt, anchors and input stand (``methods/template.py``); P is the
    number of its trained vectors, ``length`` for each ``{prompt}``, and may be 0.  A label's score
    is the product of its vector with what the output head reads at the decoder's first position; it
    starts from the head's own vector for the label's first piece, so that scores start as the
    logits of these pieces.  Ranks, and writes nothing.
    """

    scores_labels: ClassVar[bool] = True
    default_optimizer: ClassVar[Mapping[str, Any]] = {"rates": ("method/class_CD=0.01",)}

    length: int = 8
    template: str = "{prompt} {input}"
    init: Init = "sampled_vocabulary"
    init_text: str = ""
    init_path: str = ""
    init_population: int = 5000

    def attach(self, model: T5, *, key: Array, context: Context) -> TunedModel:
        words = context.vocabulary or model.vocabulary
        if not context.labels or words is None:
            raise UserError(
                "method=warp scores labels: give data.labels where the task has none, and "
                "model.vocabulary where the model came without"
            )
        labels = tuple((*words.encode(label), model.token_ids.eos) for label in context.labels)
        for label, tokens in zip(context.labels, labels, strict=True):
            if len(tokens) == 1 or labels.count(tokens) > 1:
                raise UserError(f"method=warp: the label {label!r} has no tokens of its own")
        template = self._template()
        prompt_PD = None
        if template.prompt_length:
            prompt_PD = initial_prompt(
                self.init,
                key=key,
                embedding_VD=model.token_embedder.table(),
                length=template.prompt_length,
                vocabulary=words,
                labels=context.labels,
                text=self.init_text,
                path=self.init_path,
                population=self.init_population,
            )
        class_CD = model.output_vectors(jnp.asarray([tokens[0] for tokens in labels]))
        placed = place(template, words)
        module = ClassVectors(self, prompt_PD, class_CD, placed=placed, labels=labels)
        return TunedModel(model, module)

    def prompt_positions(self) -> int:
        """Without its anchors, whose number the vocabulary decides."""
        return self._template().prompt_length

    def config_errors(self) -> Iterator[str]:
        self._template()
        yield from ()

    def _template(self) -> Template:
        return parse_template(self.template, length=self.length)


class ClassVectors(TuningModule):
    """Puts the prompt into the input, and scores the labels."""

    def __init__(
        self,
        config: WARP,
        prompt_PD: Array | None,
        class_CD: Array,
        *,
        placed: Placed,
        labels: LabelTokens,
    ):
        self.config = config
        self.placed = placed
        self.labels = labels
        if prompt_PD is not None:
            self.prompt_PD = small_param(prompt_PD, "prompt", "prompt_embed")
        self.class_CD = small_param(class_CD, None, "prompt_embed")

    @property
    def label_tokens(self) -> LabelTokens:
        return self.labels

    def label_logits(self, hidden_BD: Array) -> Array:
        return matmul.dot(hidden_BD, self.class_CD.get_value().T, dtype=jnp.float32)

    def injections(
        self,
        model: T5,
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
            encoder_input=put(all_AD, source, tokens_BT, self.placed.behind, eos_id=model.input_eos)
        )
