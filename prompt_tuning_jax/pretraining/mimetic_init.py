"""How the attention of a model with random weights starts: as trained attention is, or better."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.t5.attention import Attention
from prompt_tuning_jax.models.t5.model import T5

# Of mimetic attention: its scores, and how much of a value it adds.
SHARPNESS = 0.25
CARRIED = 0.3
CARRIED_ACROSS = 1.0
# Of matching attention: the score of a position that is all alike, and how much of a value it adds.
MATCHED = 16.0
CARRIED_BY_MATCH = 4.0


def start_attention(model: T5, *, matching: bool, seed: int = 0) -> None:
    """Sets every attention to look at what is similar, and to pass on what it sees.

    After Trockman & Kolter 2023, who found products of trained query and key maps, and of value and
    output maps, to be near multiples of the identity: here both are, with one random rotation per
    layer.  Cross attention so carries words from the encoder to the output layer from the first
    step on, where otherwise thousands of steps pass before it does.

    With ``matching``, the first half of the encoder's layers do not look for what is like a
    position but for what is like it when turned by half the model's width, where
    ``methods.DescribedPrompts`` has the words of a class: each position of a text then takes on the
    labels of the classes that it is like.  Untrained, that already finds the right one of two
    classes by a word in the text in three of four cases, where mimetic attention alone is at
    chance.

    Needs heads * width of a head = model width; raises UserError otherwise.
    """
    config = model.config
    if config.num_heads * config.head_dim != config.embed_dim:
        raise UserError(
            "model.attention=mimetic and matching need num_heads * head_dim = embed_dim"
        )
    random = np.random.default_rng(seed)
    encoder = [model.encoder.layer(i).attention for i in range(config.num_encoder_layers)]
    layers = [model.decoder.layer(i) for i in range(config.num_decoder_layers)]
    cross = [layer.encoder_decoder_attention for layer in layers]
    matched = encoder[: (len(encoder) + 1) // 2] if matching else []
    for attention in (*encoder, *(layer.self_attention for layer in layers), *cross):
        rotation_DJ = _rotation(random, config.embed_dim)
        if attention in matched:
            sharpness = (MATCHED / config.head_dim) ** 0.5
            label_DJ = _rotation(random, config.embed_dim)
            turned_DJ = np.roll(rotation_DJ, -(config.embed_dim // 2), axis=0)
            carried = CARRIED_BY_MATCH**0.5
            kernels = {
                "query": turned_DJ * sharpness,
                "key": rotation_DJ * sharpness,
                "value": label_DJ * carried,
                "out": label_DJ.T * carried,
            }
        else:
            # A normed position scores 64 * sharpness**2 with itself in each head of width 64.
            sharpness = SHARPNESS * (64 / config.head_dim) ** 0.5
            carried = (CARRIED_ACROSS if attention in cross else CARRIED) ** 0.5
            kernels = {
                "query": rotation_DJ * sharpness,
                "key": rotation_DJ * sharpness,
                "value": rotation_DJ * carried,
                "out": rotation_DJ.T * carried,
            }
        _set(attention, kernels)


def _rotation(random: np.random.Generator, width: int) -> np.ndarray:
    return np.linalg.qr(random.normal(size=(width, width)))[0]


def _set(attention: Attention, kernels: Mapping[str, np.ndarray]) -> None:
    for name, value in kernels.items():
        kernel = getattr(attention, name).kernel
        kernel.set_value(jnp.asarray(value, kernel.get_value().dtype))
