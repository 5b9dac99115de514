"""Wrong calls from Python are told in one line what was meant."""

import dataclasses
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest

import prompt_tuning_jax as pt
from prompt_tuning_jax.config.experiment import Data, Experiment, Training
from prompt_tuning_jax.errors import UserError, with_named_arguments
from prompt_tuning_jax.methods import METHODS, LoRA, PromptTuning

FUNCTIONS = [name for name in pt.__all__ if inspect.isfunction(getattr(pt, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_names_the_argument_that_there_is_not(name: str) -> None:
    function = getattr(pt, name)
    first = next(iter(inspect.signature(function).parameters))
    with pytest.raises(UserError, match=f"{name} has no argument 'no_such'") as error:
        function(**{first: "x", "no_such": 1})
    assert "\n" not in str(error.value) and first in str(error.value)
    with pytest.raises(UserError, match=f"^{name}"):
        function()
    assert function.__doc__ and function.__name__ == name


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: pt.generate("m", ["x"], promt=3), "'promt': did you mean 'prompt'"),
        (lambda: pt.convert("a", "b", overwritten=True), "did you mean 'overwrite'"),
        (lambda: pt.generate("m"), "'inputs'"),
        (lambda: pt.score("m", ["a"], ["b"], None, 5), "5 values"),
        (lambda: Data(trian="x"), "Data has no field 'trian': did you mean 'train'"),
        (lambda: Training(learning_rate=1), "it is a field of Optimizer"),
        (lambda: PromptTuning(lenght=3), "PromptTuning has no field 'lenght': did you mean 'len"),
        (lambda: dataclasses.replace(LoRA(), rnk=3), "did you mean 'rank'"),
        (lambda: Data("train.jsonl"), "Data takes its fields by name"),
        (lambda: Experiment(Data()), "Experiment takes its fields by name"),
    ],
)
def test_what_was_meant(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        call()
    assert said in str(error.value) and "\n" not in str(error.value)


def test_an_error_within_the_function_is_its_own() -> None:
    def function(x: int, *, y: int = 0) -> int:
        return x + len(y)  # type: ignore[arg-type]

    with pytest.raises(TypeError, match="has no len"):
        with_named_arguments(function)(1, y=2)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_configs_are_plain_dataclasses_still(name: str) -> None:
    method: Any = METHODS[name]()
    assert pickle.loads(pickle.dumps(method)) == method == dataclasses.replace(method)
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.length = 3


def test_the_version() -> None:
    assert pt.__version__.count(".") == 2


@pytest.mark.parametrize("path", [5, None, ["tiny"], 1.5])
def test_what_is_no_path_is_said(path: Any) -> None:
    for call in (pt.load_model, pt.load_prompt):
        with pytest.raises(pt.UserError, match=f"not .*{type(path).__name__}"):
            call(path)
