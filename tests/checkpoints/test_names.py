import math

import pytest

from prompt_tuning_jax.checkpoints.parameters import parameter_shapes
from prompt_tuning_jax.models.t5.config import PRESETS

PUBLISHED = {
    "small": 76_961_152,
    "base": 247_577_856,
    "large": 783_150_080,
    "xl": 2_849_757_184,
    "xxl": 11_135_332_352,
    "t5_1_0_small": 60_506_624,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name: str) -> None:
    shapes = parameter_shapes(PRESETS[name])
    assert sum(math.prod(shape) for shape in shapes.values()) == PUBLISHED[name]
