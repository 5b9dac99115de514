"""Pre-training with part of the input as prompt vectors, so that the model learns to use them."""

import jax.numpy as jnp

from prompt_tuning_jax.config.methods import DescribedPrompts
from prompt_tuning_jax.methods.base import TuningModule
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.models.injections import Injections, ModelInput
from prompt_tuning_jax.typing import Array, HostArray


class PooledWords(TuningModule[DescribedPrompts]):
    """Turns the words at the start of the input into prompt vectors by pooling embeddings."""

    def injections(
        self,
        model: Model,
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
            model_input=ModelInput(
                embeddings_BUD=jnp.concatenate(
                    [label_BPD + content_BPD, source.embeddings_BUD], axis=1
                ),
                mask_BU=jnp.concatenate([real_BPW[:, :, 0], source.mask_BU], axis=1),
            )
        )
