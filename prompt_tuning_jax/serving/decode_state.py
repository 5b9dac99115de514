"""What is being written, row by row: M slots on the device."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from prompt_tuning_jax.distributed.sharding import Partitioner
from prompt_tuning_jax.inference.decoding.logits_processors import LogitsProcessors
from prompt_tuning_jax.models.injections import KeyValues
from prompt_tuning_jax.models.t5.attention import SelfCache
from prompt_tuning_jax.models.t5.config import T5Config
from prompt_tuning_jax.serving.prompt_position import device_put
from prompt_tuning_jax.serving.rows import WriteOptions
from prompt_tuning_jax.serving.shapes import Shapes
from prompt_tuning_jax.typing import Array, DType

KEYS = ("batch", "length", "heads", "kv")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DecodeState:
    """M slots, each with what one row needs to be written on; a slot that is done is free."""

    cross: tuple[KeyValues, ...]
    caches: tuple[SelfCache, ...]
    mask_MU: Array
    token_M: Array
    position_M: Array
    options: WriteOptions  # each ``[M]``
    score_M: Array
    done_M: Array
    ids_MS: Array


class Written(NamedTuple):
    """What the host looks at after some steps."""

    ids_MS: Array
    position_M: Array
    score_M: Array
    done_M: Array


def init_decode_state(
    shapes: Shapes, config: T5Config, *, dtype: DType, partitioner: Partitioner | None
) -> DecodeState:
    """All slots free, for the longest inputs, prompts and texts."""
    slots, layers = shapes.slots, config.num_decoder_layers
    heads = (config.num_heads, config.head_dim)

    def keys(length: int) -> Array:
        return device_put(np.zeros((slots, length, *heads), dtype), KEYS, partitioner)

    def whole(*shape: int, dtype: Any = np.int32) -> Array:
        return device_put(np.zeros((slots, *shape), dtype), (None,) * (1 + len(shape)), partitioner)

    width, written = shapes.widths()[-1], shapes.max_new_tokens
    return DecodeState(
        cross=tuple(KeyValues(key_BPHK=keys(width), value_BPHK=keys(width)) for _ in range(layers)),
        caches=tuple(
            SelfCache(key_BSHK=keys(written), value_BSHK=keys(written)) for _ in range(layers)
        ),
        mask_MU=whole(width, dtype=bool),
        token_M=whole(),
        position_M=whole(),
        options=WriteOptions(
            limit_B=whole(),
            processors=LogitsProcessors(
                min_length=whole(),
                repetition_penalty=whole(dtype=np.float32),
                no_repeat_ngram_size=whole(),
            ),
        ),
        score_M=whole(dtype=np.float32),
        done_M=device_put(np.ones(slots, bool), (None,), partitioner),
        ids_MS=whole(written),
    )
