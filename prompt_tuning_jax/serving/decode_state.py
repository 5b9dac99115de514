"""The M slots of one width on the device whose rows are being decoded."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from prompt_tuning_jax.distributed.sharding import Partitioner
from prompt_tuning_jax.inference.decoding.logits_processors import LogitsProcessors
from prompt_tuning_jax.models.base import DecodeContext, Model
from prompt_tuning_jax.models.injections import KeyValues
from prompt_tuning_jax.serving.prompt_cache import device_put
from prompt_tuning_jax.serving.shapes import DecodeOptions, Shapes, SlotPool
from prompt_tuning_jax.typing import Array, HostArray

KEY_AXES = ("batch", "length", "heads", "kv")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DecodeState:
    """M slots, each with everything that decoding its row needs; a slot that is done is free.

    ``tokens_MT`` are the inputs, and ``context`` is what the model has read of them.
    """

    tokens_MT: Array
    context: DecodeContext
    caches: tuple[KeyValues, ...]
    token_M: Array
    position_M: Array
    options: DecodeOptions  # each ``[M]``
    score_M: Array
    done_M: Array
    ids_MS: Array


class DecodeOutput(NamedTuple):
    """What the host reads after a few steps, of the slots of one pool or of all."""

    ids_MS: Array | HostArray
    position_M: Array | HostArray
    score_M: Array | HostArray
    done_M: Array | HostArray


def init_decode_state(
    shapes: Shapes, pool: SlotPool, model: Model, *, width: int, partitioner: Partitioner | None
) -> DecodeState:
    """All slots of a pool free, with room for ``width`` positions of prompt and input each."""
    slots = len(pool.slots)

    def zeros(like: Any) -> Array:
        axes = KEY_AXES if len(like.shape) == len(KEY_AXES) else (None,) * len(like.shape)
        return device_put(np.zeros(like.shape, like.dtype), axes, partitioner)

    def whole(*shape: int, dtype: Any = np.int32) -> Array:
        return device_put(np.zeros((slots, *shape), dtype), (None,) * (1 + len(shape)), partitioner)

    def start(tokens_MU: Array) -> Any:
        return model.start_decoding(model.read(model.embed(tokens_MU)), shapes.max_new_tokens)

    tokens_MU = jax.ShapeDtypeStruct((slots, width), np.int32)
    context, caches = jax.tree.map(zeros, jax.eval_shape(start, tokens_MU))
    return DecodeState(
        tokens_MT=whole(pool.lengths[-1]),
        context=context,
        caches=caches,
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
        ids_MS=whole(shapes.max_new_tokens),
    )


def idle_output(shapes: Shapes, pool: SlotPool) -> DecodeOutput:
    """Returns the output of slots of which none is decoded."""
    slots = len(pool.slots)
    return DecodeOutput(
        ids_MS=np.zeros((slots, shapes.max_new_tokens), np.int32),
        position_M=np.zeros(slots, np.int32),
        score_M=np.zeros(slots, np.float32),
        done_M=np.ones(slots, bool),
    )
