"""What a tuned file claims is compared with its arrays before it costs memory or time."""

import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.array_files import METHOD, safetensors_of
from prompt_tuning_jax.config.overrides import method_to_json
from prompt_tuning_jax.distributed.sharding import Partitioner, make_mesh
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.loading_methods import (
    attach_stored,
    members_of_stored,
    stored_methods,
)
from prompt_tuning_jax.methods import Context, MethodConfig, attach_method
from prompt_tuning_jax.models.t5.model import T5
from prompt_tuning_jax.untrusted_input import compile_pattern
from tests.limits import bounded
from tests.method_cases import CASES, LABELS
from tests.micro import ONE_LAYER, Words, make_t5

METHODS = {
    name: case.method
    for name, case in CASES.items()
    if name not in ("full", "lora_stabilized_everywhere")
}
CATASTROPHIC = "(([a-z_/]+)+)+!"
# What no longer matters once a method is trained.
OVER = ("init_population", "init_labels", "source_task", "source_member", "frozen")
# Of each kind of field what would hang, or allocate, or be obeyed to no good.
LIES: dict[type, list[Any]] = {
    int: [300_000, 10**9, 10**40, -1],
    str: ["{prompt:1000000000} {input}", "{"],
    tuple: [[CATASTROPHIC], ["["], [".*"] * 20_000, [10**9], ["(?=x)"]],
}


def lies() -> list[Any]:
    """Every lie once for every field; of the sizes of one method each in turn."""
    cases, number = [], 0
    for name, method in METHODS.items():
        fields: Any = method
        for field in dataclasses.fields(fields):
            value = getattr(method, field.name)
            lying = LIES.get(type(value), [])
            if field.name in OVER or (isinstance(value, str) and field.name != "template"):
                continue
            if field.type in (float, "float"):  # no size, whatever the default is
                lying = [10**40] if type(value) is int else []
            elif type(value) is int:  # a lie each
                lying = [lying[number % len(lying)]]
                number += 1
            cases += [
                pytest.param(name, field.name, lie, id=f"{name}-{field.name}-{str(lie)[:20]}")
                for lie in lying
            ]
    return cases


@functools.cache
def micro() -> T5:
    return make_t5(ONE_LAYER, vocabulary=Words())


@functools.cache
def partitioner() -> Partitioner:
    return Partitioner(mesh=make_mesh())


@functools.cache
def shapes_of(method: MethodConfig) -> dict[str, tuple[int, ...]]:
    context = Context(labels=LABELS, vocabulary=Words(), num_tasks=1)
    model = micro()
    params = jax.eval_shape(
        lambda: param_tree.split(
            attach_method(model, method, key=jax.random.key(0), context=context)
        )[1]
    )
    return {name: p.shape for name, p in params.items() if method.trains(name)}


@pytest.mark.parametrize(("name", "field", "lie"), lies())
def test_a_claim_that_the_arrays_contradict_is_one_line(
    tmp_path: Path, name: str, field: str, lie: Any
) -> None:
    method = METHODS[name]
    path = tmp_path / "tuned.safetensors"
    described = json.loads(method_to_json(method)) | {field: lie}
    metadata = {METHOD: json.dumps(described), "labels": json.dumps(LABELS)}
    arrays = {n: np.zeros(shape, np.float32) for n, shape in shapes_of(method).items()}
    path.write_bytes(safetensors_of(arrays, metadata=metadata))
    with bounded(), pytest.raises(UserError) as raised:
        opened = stored_methods(path, micro())
        list(members_of_stored(opened, micro(), partitioner(), ""))
    message = str(raised.value)
    assert message.startswith(str(path))
    assert field in message or "method.template" in message
    assert len(message) < 1000
    assert "\n" not in message


@pytest.mark.parametrize("name", METHODS)
def test_what_is_true_is_believed(tmp_path: Path, name: str) -> None:
    method = METHODS[name]
    shapes = shapes_of(method)
    attached = attach_stored(method, micro(), shapes, labels=LABELS, tasks=1, of="x")
    own = {n: p.shape for n, p in param_tree.split(attached)[1].items() if method.trains(n)}
    assert own == shapes


def test_a_larger_rank_needs_the_arrays_of_it() -> None:
    """A size that fits the largest axis, and the model, is still compared before it is used."""
    method = METHODS["lora"]
    with pytest.raises(UserError, match=r"lora_a_DR is \(16, 2\) in x and \(16, 16\)"):
        attach_stored(
            dataclasses.replace(method, rank=16),  # type: ignore[type-var]
            micro(),
            shapes_of(method),
            labels=(),
            tasks=1,
            of="x",
        )


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("[", "missing ]"),
        ("(?=x)", "(?="),
        (r"(a)\1", r"\1"),
        ("(a{1,1000}){1,1000}", "repetition"),
        ("\ud800", "surrogates"),
        ("(" * 10**5, "missing"),
        ("ab" * 10**6, "too large"),
    ],
)
def test_what_cannot_be_matched_in_bounded_time_is_refused(pattern: str, words: str) -> None:
    with pytest.raises(UserError, match="regular expression") as raised:
        compile_pattern(pattern, of="method.targets")
    assert words in str(raised.value)
    assert len(str(raised.value)) < 300


def test_a_catastrophic_pattern_is_matched_at_once() -> None:
    start = time.process_time()
    assert not compile_pattern(CATASTROPHIC, of="x").fullmatch("a" * 10_000)
    assert compile_pattern("(([a-z_/]+)+)+", of="x").fullmatch("a" * 10_000)
    assert time.process_time() - start < 1
