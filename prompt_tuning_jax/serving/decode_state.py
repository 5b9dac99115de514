"""The M slots on the device whose rows are being decoded."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from prompt_tuning_jax.distributed.sharding import Partitioner
from prompt_tuning_jax.inference.decoding.logits_processors import LogitsProcessors
from prompt_tuning_jax.models.injections import KeyValues
from prompt_tuning_jax.models.t5.attention import SelfCache
from prompt_tuning_jax.models.t5.config import T5Config
from prompt_tuning_jax.serving.prompt_cache import device_put
from prompt_tuning_jax.serving.shapes import DecodeOptions, Shapes
from prompt_tuning_jax.typing import Array, DType

KEY_AXES = ("batch", "length", "heads", "kv")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DecodeState:
    """M slots, each with everything that decoding its row needs; a slot that is done is free.

    ``tokens_MT`` are the inputs, ``mask_MU`` the real positions of the encoder's output, and
    ``cross`` the cross-attention keys and values of these positions.
    """

    tokens_MT: Array
    cross: tuple[KeyValues, ...]
    caches: tuple[SelfCache, ...]
    mask_MU: Array
    token_M: Array
    position_M: Array
    options: DecodeOptions  # each ``[M]``
    score_M: Array
    done_M: Array
    ids_MS: Array


class DecodeOutput(NamedTuple):
    """What the host reads after a few steps."""

    ids_MS: Array
    position_M: Array
    score_M: Array
    done_M: Array


def init_decode_state(
    shapes: Shapes, config: T5Config, *, width: int, dtype: DType, partitioner: Partitioner | None
) -> DecodeState:
    """All slots free, with room for ``width`` encoder positions each."""
    slots, layers = shapes.slots, config.num_decoder_layers
    heads = (config.num_heads, config.head_dim)

    def keys(length: int) -> Array:
        return device_put(np.zeros((slots, length, *heads), dtype), KEY_AXES, partitioner)

    def whole(*shape: int, dtype: Any = np.int32) -> Array:
        return device_put(np.zeros((slots, *shape), dtype), (None,) * (1 + len(shape)), partitioner)

    generated = shapes.max_new_tokens
    return DecodeState(
        tokens_MT=whole(shapes.longest),
        cross=tuple(KeyValues(key_BPHK=keys(width), value_BPHK=keys(width)) for _ in range(layers)),
        caches=tuple(
            SelfCache(key_BSHK=keys(generated), value_BSHK=keys(generated)) for _ in range(layers)
        ),
        mask_MU=whole(width, dtype=bool),
        token_M=whole(),
        position_M=whole(),
        options=DecodeOptions(
            limit_B=whole(),
            processors=LogitsProcessors(
                min_length=whole(),
                repetition_penalty=whole(dtype=np.float32),
                no_repeat_ngram_size=whole(),
            ),
        ),
        score_M=whole(dtype=np.float32),
        done_M=device_put(np.ones(slots, bool), (None,), partitioner),
        ids_MS=whole(generated),
    )
