"""What the README shows as code is code that works."""

import re
import shlex
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from prompt_tuning_jax.cli.arguments import build_parser
from prompt_tuning_jax.methods import Context, TunedModel
from prompt_tuning_jax.models.t5.model import T5
from prompt_tuning_jax.typing import Array
from tests.micro import ONE_LAYER, D, call, make_t5

README = Path(__file__).resolve().parents[1] / "README.md"
TOKENS = np.array([[5, 6, 7, 1], [8, 9, 1, 0]], np.int32)
TARGETS = np.array([[0, 4], [0, 5]], np.int32)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def commands() -> list[str]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("prompt-tuning ")]


@pytest.mark.parametrize("line", commands())
def test_its_commands_are_commands(line: str) -> None:
    args, unknown = build_parser().parse_known_args(shlex.split(line, comments=True)[1:])
    assert not unknown
    config = getattr(args, "config", None)
    assert config is None or (README.parent / config).is_file()


def test_the_method_of_ones_own_is_a_method():
    (code,) = [block for block in blocks("python") if "(Method)" in block]
    own = code[code.index("@dataclass") :]
    assert len(own.strip().splitlines()) <= 20
    # Dataclasses look their module up.
    space: dict[str, Any] = {"__name__": __name__}
    exec(compile(code, "README.md", "exec"), space)
    model: T5 = make_t5(ONE_LAYER)
    context, key = Context(), jax.random.key(0)
    attached: TunedModel = space["InputScale"]().attach(model, key=key, context=context)
    same = call(model, TOKENS, TARGETS)
    np.testing.assert_allclose(attached(TOKENS, TARGETS), same, atol=1e-5)
    factors: Array = attached.method.factor_D.get_value()
    assert factors.shape == (D,)
    attached.method.factor_D.set_value(2 * factors)
    assert np.abs(attached(TOKENS, TARGETS) - same).max() > 1e-3
