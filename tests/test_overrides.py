import dataclasses
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prompt_tuning_jax.config.config_file import load_config
from prompt_tuning_jax.config.experiment import Experiment, Model, Optimizer, Training
from prompt_tuning_jax.config.overrides import (
    apply_override,
    apply_overrides,
    checked_experiment,
    diff,
    from_dict,
    from_json,
    group_classes,
    method_from_json,
    method_to_json,
    to_dict,
    to_json,
)
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods import METHODS, FullTuning, LoRA, PromptTuning

PLAIN = {
    bool: st.booleans(),
    int: st.integers(-(10**12), 10**12),
    float: st.floats(allow_nan=False, allow_infinity=False),
    str: st.text(max_size=20) | st.sampled_from(["x=y", "a, b", '"quoted"', "{a}\n{b}", "[1]"]),
}
few = settings(
    max_examples=10, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


def values(annotation: Any) -> st.SearchStrategy[Any]:
    """Values of a field of this type, whether they make sense or not."""
    if classes := group_classes(annotation):
        return st.one_of([configs(cls) for cls in classes])
    if get_origin(annotation) is tuple:
        return st.lists(values(get_args(annotation)[0]), max_size=3).map(tuple)
    if get_origin(annotation) is Literal:
        return st.sampled_from(get_args(annotation))
    return PLAIN[annotation]


def configs(cls: type) -> st.SearchStrategy[Any]:
    hints = get_type_hints(cls)
    return st.builds(cls, **{field.name: values(hints[field.name]) for field in fields_of(cls)})


def fields_of(cls: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(cls)


EXPERIMENTS = configs(Experiment)


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= leaves(value, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = value
    return found


def as_text(value: Any) -> str:
    """The value as a person would type it behind ``--set FIELD=``."""
    if isinstance(value, tuple):
        return json.dumps(value)
    return str(value)


def with_fields_of(experiment: Experiment, other: Experiment) -> Experiment:
    name = next(n for n, cls in METHODS.items() if type(other.method) is cls)
    sets = [f"{path}={as_text(value)}" for path, value in leaves(other).items()]
    return apply_overrides(experiment, [f"method={name}", *sets])


@few
@given(EXPERIMENTS)
def test_json_round_trip_is_exact_and_has_no_other_types(experiment: Experiment) -> None:
    back = from_json(to_json(experiment))
    assert back == experiment
    assert type(back.method) is type(experiment.method)
    assert to_json(back) == to_json(experiment)
    assert [type(v) for v in leaves(back).values()] == [
        type(v) for v in leaves(experiment).values()
    ]


@few
@given(EXPERIMENTS)
def test_dict_round_trip(experiment: Experiment) -> None:
    assert from_dict(to_dict(experiment)) == experiment


@few
@given(EXPERIMENTS)
def test_method_round_trip(experiment: Experiment) -> None:
    assert method_from_json(method_to_json(experiment.method)) == experiment.method


@settings(few, max_examples=5)
@given(EXPERIMENTS)
def test_any_experiment_can_be_typed(experiment: Experiment) -> None:
    assert with_fields_of(Experiment(), experiment) == experiment


@few
@given(EXPERIMENTS, EXPERIMENTS, st.data())
def test_diff_names_exactly_what_differs(
    a: Experiment, donor: Experiment, data: st.DataObject
) -> None:
    common = sorted(leaves(a).keys() & leaves(donor).keys())
    # Two methods may have a field of the same name and of another type.
    if type(a.method) is not type(donor.method):
        common = [path for path in common if not path.startswith("method.")]
    paths = data.draw(st.lists(st.sampled_from(common), max_size=6, unique=True))
    b = apply_overrides(a, [f"{path}={as_text(leaves(donor)[path])}" for path in paths])
    lines = dict(line.split(": ", 1) for line in diff(a, b))
    assert set(lines) == {path for path in paths if leaves(a)[path] != leaves(b)[path]}
    for path, change in lines.items():
        old, new = change.split(" -> ")
        assert json.loads(old) == json.loads(json.dumps(leaves(a)[path]))
        assert json.loads(new) == json.loads(json.dumps(leaves(b)[path]))
    assert diff(a, a) == []


def test_diff_reads_as_a_sentence() -> None:
    other = apply_overrides(
        Experiment(), ["optimizer.learning_rate=0.1", "training.seeds=0,1", "model.name_or_path=b"]
    )
    assert diff(Experiment(), other) == [
        'model.name_or_path: "tiny" -> "b"',
        "optimizer.learning_rate: 0.3 -> 0.1",
        "training.seeds: [0] -> [0, 1]",
    ]
    assert diff(Experiment(), apply_override(Experiment(), "training.steps=30001")) == [
        "training.steps: 30000 -> 30001"
    ]
    assert diff(Experiment(), Experiment(method=FullTuning())) == [
        'method: "PromptTuning" -> "FullTuning"'
    ]


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("optimizer.learning_rate=0.1", "optimizer.learning_rate", 0.1),
        ("optimizer.learning_rate=1e-3", "optimizer.learning_rate", 0.001),
        ("optimizer.learning_rate=1", "optimizer.learning_rate", 1.0),
        ("training.steps=30_000", "training.steps", 30_000),
        ("data.cache=false", "data.cache", False),
        ("data.cache=True", "data.cache", True),
        ("training.seeds=0,1,2", "training.seeds", (0, 1, 2)),
        ("training.seeds=[0,1,2]", "training.seeds", (0, 1, 2)),
        ("training.seeds=7", "training.seeds", (7,)),
        ("training.seeds=7,", "training.seeds", (7,)),
        ("training.learning_rates=0.1, 1", "training.learning_rates", (0.1, 1.0)),
        ("data.labels=", "data.labels", ()),
        ("data.labels=[]", "data.labels", ()),
        ("data.labels=yes,no", "data.labels", ("yes", "no")),
        ("data.labels=[yes, no]", "data.labels", ("yes", "no")),
        ("data.labels=[yes], no", "data.labels", ("[yes]", "no")),
        ("data.labels=[", "data.labels", ("[",)),
        ("optimizer.rates=[^/]*/bias=2", "optimizer.rates", ("[^/]*/bias=2",)),
        ("optimizer.rates=[ab]/.*=2,[cd]=[3]", "optimizer.rates", ("[ab]/.*=2", "[cd]=[3]")),
        ('data.labels=["yes, but", "no"]', "data.labels", ("yes, but", "no")),
        ("data.inputs_template=a=b", "data.inputs_template", "a=b"),
        ("data.inputs_template= x ", "data.inputs_template", " x "),
        ("model.dtype=bfloat16", "model.dtype", "bfloat16"),
        ("method.length=20", "method.length", 20),
        ("method.init=uniform", "method.init", "uniform"),
    ],
)
def test_values_as_people_type_them(override: str, path: str, value: Any) -> None:
    found = leaves(apply_override(Experiment(), override))
    assert found[path] == value
    assert type(found[path]) is type(value)
    assert {p for p, v in leaves(Experiment()).items() if found[p] != v} <= {path}


def test_a_method_is_picked_by_name_with_its_defaults() -> None:
    experiment = apply_overrides(Experiment(), ["method=full"])
    assert experiment.method == FullTuning()
    experiment = apply_overrides(experiment, ["method=prompt_tuning", "method.init=uniform"])
    assert experiment.method == PromptTuning(init="uniform")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optimizer.learning_rat=1", ["'optimizer.learning_rat'", "'optimizer.learning_rate'?"]),
        ("optimiser.learning_rate=1", ["did you mean 'optimizer.learning_rate'?"]),
        ("learning_rate=1", ["did you mean 'optimizer.learning_rate'"]),
        ("optimizer.steps=1", ["did you mean 'training.steps'?"]),
        ("method.lenght=1", ["did you mean 'method.length'?"]),
        ("optimizer.qqq=1", ["'optimizer.qqq'", "name, learning_rate, schedule"]),
        ("qqq=1", ["'qqq'", "model, method, data"]),
        ("optimizer.name.x=1", ["'optimizer.name.x'"]),
        ("optimizer.__class__=1", ["'optimizer.__class__'"]),
        ("__init__.__globals__=1", ["'__init__.__globals__'"]),
        ("=1", ["no field ''"]),
        ("training.steps", ["'training.steps'", "FIELD=VALUE"]),
        ("training.steps=many", ["training.steps", "whole number", "'many'"]),
        ("training.steps=1.5", ["training.steps", "whole number", "'1.5'"]),
        ("training.steps=", ["training.steps", "whole number", "''"]),
        ("optimizer.learning_rate=fast", ["optimizer.learning_rate", "number", "'fast'"]),
        ("optimizer.learning_rate=nan", ["optimizer.learning_rate", "finite", "nan"]),
        ("optimizer.learning_rate=1e999", ["optimizer.learning_rate", "finite", "inf"]),
        ("data.cache=1", ["data.cache", "true or false", "'1'"]),
        ("data.labels=[1,2]", ["data.labels", "text", "1"]),
        ("training.seeds=0,a", ["training.seeds", "whole number", "'a'"]),
        ("training.seeds=0,,1", ["training.seeds", "whole number", "''"]),
        ("training.seeds=[true]", ["training.seeds", "whole number", "True"]),
        ("optimizer.name=adafacto", ["optimizer.name", "'adafactor'", "adamw", "sgd"]),
        ("method=prompt_tunin", ["method", "'prompt_tuning'", "full"]),
        ("method.init=label", ["method.init", "class_labels", "uniform"]),
        ("optimizer=adamw", ["optimizer is a group", "optimizer.name"]),
        ("model.name_or_path=\udcff", ["model.name_or_path", "text"]),
    ],
)
def test_wrong_overrides_get_one_line(override: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        apply_override(Experiment(), override)
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_a_field_that_only_another_method_has() -> None:
    with pytest.raises(UserError, match=r"'method\.length'.*FullTuning has no fields"):
        apply_overrides(Experiment(), ["method=full", "method.length=3"])


@pytest.mark.parametrize("path", sorted(leaves(Experiment())))
def test_every_misspelled_field_is_recognized(path: str) -> None:
    middle = len(path) - 2
    misspelled = path[:middle] + path[middle + 1 :]
    with pytest.raises(UserError, match=f"did you mean .*'{path}'"):
        apply_override(Experiment(), f"{misspelled}=1")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{", ["not the JSON of an experiment"]),
        ("[" * 100_000, ["not the JSON of an experiment"]),
        ("3", ["not the JSON of an experiment", "3"]),
        ('{"optimizer": {"learning_rat": 1}}', ["'optimizer.learning_rat'", "'learning_rate'"]),
        ('{"optimiser": {}}', ["'optimiser'", "'optimizer'"]),
        ('{"optimizer": 3}', ["optimizer", "expected Optimizer", "3"]),
        ('{"optimizer": {"class": "Data"}}', ["expected Optimizer", "Data"]),
        ('{"method": {"length": 3}}', ["method", "PromptTuning or ", "no class"]),
        ('{"method": {"class": "Path"}}', ["method", "PromptTuning or ", "Path"]),
        ('{"method": {"class": ["PromptTuning"]}}', ["method", "PromptTuning or "]),
        ('{"training": {"steps": 1.0}}', ["training.steps", "whole number", "1.0"]),
        ('{"training": {"steps": true}}', ["training.steps", "whole number", "True"]),
        ('{"training": {"steps": null}}', ["training.steps", "whole number", "None"]),
        ('{"training": {"z_loss": true}}', ["training.z_loss", "finite number", "True"]),
        ('{"training": {"z_loss": NaN}}', ["NaN is not JSON"]),
        ('{"training": {"z_loss": 1%s}}' % ("0" * 400), ["401 digits"]),
        ('{"data": {"cache": 1}}', ["data.cache", "true or false", "1"]),
        ('{"data": {"labels": "ab"}}', ["data.labels", "list", "'ab'"]),
        ('{"model": {"dtype": "float16"}}', ["model.dtype", "float32", "bfloat16"]),
        ('{"model": {"dtype": ["float32"]}}', ["model.dtype", "float32", "bfloat16"]),
    ],
)
def test_json_that_is_not_an_experiment(text: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        from_json(text)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_fields_that_json_leaves_out_have_their_defaults() -> None:
    assert from_json("{}") == Experiment()
    assert from_json('{"training": {"steps": 7}}') == Experiment(training=Training(steps=7))


def test_python_configs_are_put_into_exact_types() -> None:
    loose = Experiment(
        training=Training(seeds=[1, 2], learning_rates=[1, 2]),  # type: ignore[arg-type]
        optimizer=Optimizer(learning_rate=1),
    )
    experiment = checked_experiment(loose)
    assert experiment.training.seeds == (1, 2)
    assert repr(experiment.training.learning_rates) == "(1.0, 2.0)"
    assert repr(experiment.optimizer.learning_rate) == "1.0"
    assert experiment == from_dict(to_dict(experiment))
    hash(experiment)


def test_a_group_of_the_wrong_class_is_refused() -> None:
    with pytest.raises(UserError, match="optimizer: expected Optimizer, got Model"):
        checked_experiment(Experiment(optimizer=Model()))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"method: expected PromptTuning or .*got Model"):
        checked_experiment(Experiment(method=Model()))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="method: expected PromptTuning or "):
        checked_experiment(Experiment(method=PromptTuning))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_another_method_brings_the_optimizer_that_it_is_usually_trained_with(name: str) -> None:
    config = Path(__file__).parents[1] / "configs/quickstart.py"
    changed = apply_overrides(load_config(str(config)), [f"method={name}"])
    assert changed.method == METHODS[name]()
    usual = {"schedule": "linear", **METHODS[name].default_optimizer}
    assert changed.optimizer == Optimizer(**usual)
    back = apply_overrides(changed, ["method=prompt_tuning"])
    assert back.optimizer == Optimizer(schedule="linear")
    # Its own config has the same.
    own = config.with_name(f"{'model_tuning' if name == 'full' else name}.py")
    if own.exists():
        written = load_config(str(own))
        assert type(written.method) is METHODS[name]
        assert replace(written.optimizer, schedule="linear") == changed.optimizer


def test_what_is_set_beside_a_method_is_as_it_is_set() -> None:
    for overrides in itertools.permutations(
        ["method=lora", "optimizer.learning_rate=0.2", "method.rank=2"]
    ):
        changed = apply_overrides(Experiment(), overrides)
        assert changed.method == LoRA(rank=2)
        assert (changed.optimizer.learning_rate, changed.optimizer.weight_decay) == (0.2, 0.0)
    own = Experiment(optimizer=Optimizer(learning_rate=0.05))
    same = apply_overrides(own, ["method=prompt_tuning", "method.length=5"])
    assert same.optimizer == own.optimizer


@pytest.mark.parametrize(
    ("typed", "said"),
    [("bitfit", "'pattern'"), ("model_tuning", "'full'"), ("lorra", "'lora'"), ("x", "adapters")],
)
def test_names_of_methods_that_were_meant(typed: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        apply_overrides(Experiment(), [f"method={typed}"])
    assert apply_overrides(Experiment(), ["method=LoRA"]).method == LoRA()
