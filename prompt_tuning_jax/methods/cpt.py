"""Context-aware prompt tuning: trained changes of labeled examples (Blau et al. 2024).

Each token of the context has a type, as in peft 0.21 (tuners/cpt).  For example number ``i``, from
0, it is ``4 * i`` plus 1 for the template before the inputs, 2 for the inputs, 3 for the template
between inputs and target, and 4 for the target.
"""

import logging
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp

from prompt_tuning_jax.config.methods import CPT, PromptTuning
from prompt_tuning_jax.config.text_template import parse_template
from prompt_tuning_jax.data.vocabularies.vocab import Vocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods.base import Context, TunedModel, TuningModule
from prompt_tuning_jax.methods.dense import small_param
from prompt_tuning_jax.methods.prompt import with_prompt
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.models.injections import Injections, ModelInput
from prompt_tuning_jax.models.losses import TokenSums
from prompt_tuning_jax.typing import Array, FlatParams, HostArray

_TEMPLATE, _INPUTS, _MIDDLE, _TARGET = 1, 2, 3, 4
_NUM_TYPES = 4
_WIDTH = 2048  # of the model for which the bounds are given
_DELTA = "method/delta_QD"

_log = logging.getLogger(__name__)


class ContextPrompt(TuningModule[CPT]):
    """Puts the examples before the input, with a trained change of Q of their P tokens."""

    def __init__(
        self,
        config: CPT,
        tokens: tuple[int, ...],
        types: tuple[int, ...],
        delta_QD: Array | HostArray,
    ):
        super().__init__(config)
        self.tokens, self.types = tokens, types
        self.delta_QD = small_param(jnp.asarray(delta_QD), "prompt", "prompt_embed")

    @classmethod
    def attach(cls, config: CPT, model: Model, *, key: Array, context: Context) -> TunedModel:
        if not model.causal:
            raise UserError("method=cpt is only for decoder-only models; use another method")
        vocabulary = context.vocabulary or model.vocabulary
        if vocabulary is None:
            raise UserError("method=cpt needs the model's vocabulary; set model.vocabulary")
        texts = iter(config.examples)
        examples = context.examples or tuple(
            {"inputs": inputs, "targets": targets}
            for inputs, targets in zip(texts, texts, strict=True)
        )
        tokens, types = _context(config, examples, vocabulary, end=model.token_ids.eos)
        changed = sum(_changes(kind) for kind in types)
        delta_QD = jnp.zeros((changed, model.config.embed_dim), jnp.float32)
        return TunedModel(model, cls(config, tokens, types, delta_QD))

    def for_inference(self, model: Model) -> TunedModel:
        config = PromptTuning(length=len(self.tokens)).as_trained()
        return with_prompt(model, self.prompt(model), config)

    def prompt(self, model: Model) -> Array:
        """Computes the prompt ``[P, D]``: the embeddings of the context with their changes."""
        ids_P = jnp.asarray(self.tokens, jnp.int32)
        embedding_PD = model.embedding_table()[ids_P].astype(jnp.float32)
        at_Q = jnp.asarray([i for i, kind in enumerate(self.types) if _changes(kind)], jnp.int32)
        delta_QD: Array = self.delta_QD.get_value()
        # The gradient is that of the bounded change, as in PEFT, and does not pass the bound.
        bounded_QD = delta_QD + jax.lax.stop_gradient(self._bounded(delta_QD) - delta_QD)
        return embedding_PD.at[at_Q].add(bounded_QD)

    def injections(
        self,
        model: Model,
        tokens_BT: Array | HostArray,
        *,
        task_B: Array | HostArray | None = None,
        key: Array | None = None,
    ) -> Injections:
        return Injections(model_input=model.embed(tokens_BT, self.prompt(model)))

    def context_sums(self, model: Model, *, z_loss: float = 0.0) -> TokenSums | None:
        # Nothing predicts the first token.
        weights = {place: weight for place, weight in self._answers() if place}
        if not weights:
            return None
        places_N = jnp.asarray([*weights], jnp.int32)
        embeddings_1PD = self.prompt(model)[None].astype(model.dtype)
        source = ModelInput(
            embeddings_BUD=embeddings_1PD, mask_BU=jnp.ones(embeddings_1PD.shape[:2], bool)
        )
        hidden_PD = model.read(source).hidden_BUD[0]
        ids_N = jnp.asarray(self.tokens, jnp.int32)[places_N]
        of = model.lazy_logits(hidden_PD[places_N - 1]).statistics(ids_N)
        loss_N = of.log_z - of.target + z_loss * jnp.square(of.log_z)
        none = jnp.zeros((), jnp.float32)
        return TokenSums(
            loss=jnp.sum(jnp.asarray([*weights.values()]) * loss_N),
            # PEFT divides by the number of answers' tokens, whatever they weigh.
            tokens=jnp.asarray(len(weights), jnp.float32),
            examples=none,
            correct=none,
        )

    def constrained(self, before: FlatParams, after: FlatParams) -> FlatParams:
        return {**after, _DELTA: self._bounded(after[_DELTA])}

    def _answers(self) -> Iterator[tuple[int, float]]:
        """Yields the place of each token of an answer, and the weight of its loss."""
        groups = sorted({kind for kind in self.types if _is_answer(kind)}, reverse=True)
        weight_of = {kind: self.config.decay ** (1 + n) for n, kind in enumerate(groups)}
        for place, kind in enumerate(self.types):
            if _is_answer(kind):
                yield place, weight_of[kind]

    def _bounded(self, delta_QD: Array) -> Array:
        """Scales down changes whose norm exceeds the bound of their token."""
        width = (delta_QD.shape[1] / _WIDTH) ** 0.5
        config = self.config
        bounds = [
            (config.epsilon if kind % _NUM_TYPES == _INPUTS else config.format_epsilon) * width
            for kind in self.types
            if _changes(kind)
        ]
        bound_Q1 = jnp.asarray(bounds, jnp.float32)[:, None]
        norm_Q1 = jnp.linalg.norm(delta_QD, axis=1, keepdims=True)
        return jnp.where(norm_Q1 > bound_Q1, delta_QD * (bound_Q1 / norm_Q1), delta_QD)


def _is_answer(kind: int) -> bool:
    return kind > 0 and kind % _NUM_TYPES == 0


def _changes(kind: int) -> bool:
    """Returns whether training changes the tokens of a type."""
    return kind % _NUM_TYPES != 0


def _context(
    config: CPT, examples: tuple[Mapping[str, str], ...], vocabulary: Vocabulary, *, end: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the tokens of the examples that fit ``config.length``, and the type of each."""
    template = parse_template(config.demonstration, field="method.demonstration")
    tokens: list[int] = []
    types: list[int] = []

    def add(ids: list[int], kind: int) -> None:
        tokens.extend(ids)
        types.extend([kind] * len(ids))

    for number, example in enumerate(examples):
        first, length = _NUM_TYPES * number, len(tokens)
        add([*vocabulary.input_start], first + _TEMPLATE)
        kind = _TEMPLATE
        for literal, column in zip(template.literals, (*template.columns, ""), strict=True):
            add(vocabulary.encode(literal) if literal else [], first + kind)
            if column == "inputs":
                add(vocabulary.encode(example["inputs"]), first + _INPUTS)
                kind = _MIDDLE
            elif column:
                add([*vocabulary.encode(example["targets"]), end], first + _TARGET)
                kind = _NUM_TYPES + _TEMPLATE  # what is behind a target begins the next example
        if len(tokens) > config.length:
            del tokens[length:], types[length:]
            _log.warning(
                "method.length is %d, and the first %d of %d examples fit; raise it for more",
                *(config.length, number, len(examples)),
            )
            break
    if not tokens:
        raise UserError(
            "method=cpt: no example fits method.length, or there is none; set method.length, "
            "method.examples, or data with a training split"
        )
    return tuple(tokens), tuple(types)
