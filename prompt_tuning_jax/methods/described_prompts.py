"""Pre-training in which part of the input comes as prompt vectors, so that prompts have a say."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from prompt_tuning_jax.methods.base import Context, Method, TunedModel, TuningModule
from prompt_tuning_jax.models.injections import EncoderInput, Injections
from prompt_tuning_jax.models.t5.model import T5
from prompt_tuning_jax.typing import Array, HostArray


@dataclass(frozen=True, kw_only=True)
class DescribedPrompts(Method):
    """All parameters train, and prompts made from words stand where tuned ones will stand.

    The first ``positions * words`` tokens of every input are no text: each ``words`` of them make
    one prompt vector, the embedding of the first (a class's label) plus the mean of the others (its
    words) turned by half the model's width, so that the two can be told apart.  A position without
    a label is none.  Adds no parameter: the model that comes out is a plain T5.
    """

    mergeable: ClassVar[bool] = True

    positions: int = 8
    words: int = 5

    def attach(self, model: T5, *, key: Array, context: Context) -> TunedModel:
        return TunedModel(model, PooledWords(self))

    def trains(self, name: str) -> bool:
        return True


class PooledWords(TuningModule):
    """Makes prompt vectors of the words at the start of the input."""

    def __init__(self, config: DescribedPrompts):
        self.config = config

    def injections(
        self,
        model: T5,
        tokens_BT: Array | HostArray,
        *,
        task_B: Array | HostArray | None = None,
        key: Array | None = None,
    ) -> Injections:
        positions, words = self.config.positions, self.config.words
        block = positions * words
        words_BPW = jnp.asarray(tokens_BT)[:, :block].reshape(-1, positions, words)
        source = model.embed(tokens_BT[:, block:])
        vectors_BPWD = model.embed_tokens(words_BPW)
        label_BPD = vectors_BPWD[:, :, 0]
        real_BPW = words_BPW != model.token_ids.fill
        known_BPW1 = real_BPW[:, :, 1:, None].astype(vectors_BPWD.dtype)
        number_BP1 = jnp.maximum(known_BPW1.sum(2), 1)
        content_BPD = (vectors_BPWD[:, :, 1:] * known_BPW1).sum(2) / number_BP1
        content_BPD = jnp.roll(content_BPD, model.config.embed_dim // 2, axis=-1)
        return Injections(
            encoder_input=EncoderInput(
                embeddings_BUD=jnp.concatenate(
                    [label_BPD + content_BPD, source.embeddings_BUD], axis=1
                ),
                mask_BU=jnp.concatenate([real_BPW[:, :, 0], source.mask_BU], axis=1),
            )
        )
