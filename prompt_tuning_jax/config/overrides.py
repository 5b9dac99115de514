"""Experiments as text: ``a.b=c`` overrides, JSON, and the differences between two of them."""

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from prompt_tuning_jax.config.base import field_types
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.config.methods import METHODS, MethodConfig
from prompt_tuning_jax.errors import UserError, suggest
from prompt_tuning_jax.untrusted_input import json_text, read_json

MAX_BYTES = 2**24  # of the JSON of an experiment, whose longest field is its labels
# JSON key with the class of a method; no field has this name, because it is a keyword.
CLASS = "class"
# Other names of methods.
_ALIASES = {
    "bitfit": "pattern",
    "model_tuning": "full",
    "fine_tuning": "full",
    "finetuning": "full",
    "p_tuning_v2": "deep_prompts",
    "spot": "prompt_tuning",
    "mpt": "multitask_prompts",
    "adapter": "adapters",
    "residual_prompt_tuning": "residual_prompt",
    "superpos": "superpos_prompt",
}


def apply_override(experiment: Experiment, override: str) -> Experiment:
    """Returns the experiment with one field replaced, for example ``optimizer.learning_rate=0.1``.

    A tuple is written as ``0,1,2`` or as a JSON list.  A method is written as its name
    (``method=full``) and has its default fields.

    Raises:
      UserError: for an unknown field, a value of another type and an invalid choice.
    """
    path, equals, text = override.partition("=")
    if not equals:
        raise UserError(
            f"{override!r}: expected FIELD=VALUE, for example optimizer.learning_rate=0.1"
        )
    path = path.strip()
    owners: list[Any] = [experiment]
    *groups, name = path.split(".")
    for group in groups:
        owner = getattr(owners[-1], group) if _has_field(owners[-1], group) else None
        if not dataclasses.is_dataclass(owner):
            raise UserError(_no_such_field(path, experiment))
        owners.append(owner)
    if not _has_field(owners[-1], name):
        raise UserError(_no_such_field(path, experiment))

    annotation = field_types(type(owners[-1]))[name]
    value = checked(_read(text, annotation, path), annotation, path)
    for owner, field in zip(reversed(owners), reversed([*groups, name]), strict=True):
        value = dataclasses.replace(owner, **{field: value})
    return checked_experiment(value)


def apply_overrides(experiment: Experiment, overrides: Iterable[str]) -> Experiment:
    """Returns the experiment with the overrides applied from left to right, but the method first.

    A different method also sets the fields of the optimizer in its ``default_optimizer``.
    """
    overrides = sorted(overrides, key=lambda override: _path(override) != "method")
    for override in overrides:
        before = experiment.method
        experiment = apply_override(experiment, override)
        if type(experiment.method) is not type(before):
            experiment = _with_default_optimizer(experiment, before)
    return experiment


def _with_default_optimizer(experiment: Experiment, before: MethodConfig) -> Experiment:
    """Returns the experiment with the optimizer's fields that the new or last method changes."""
    optimizer = experiment.optimizer
    defaults = type(optimizer)()
    # Other fields keep the values that the config chose.
    fields = {name: getattr(defaults, name) for name in before.default_optimizer}
    fields |= experiment.method.default_optimizer
    return dataclasses.replace(experiment, optimizer=dataclasses.replace(optimizer, **fields))


def _path(override: str) -> str:
    return override.partition("=")[0].strip()


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a config dataclass as nested dicts, lists, strings and numbers."""
    hints = field_types(type(config))
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            several = len(group_classes(hints[field.name])) > 1
            value = ({CLASS: type(value).__name__} if several else {}) | to_dict(value)
        values[field.name] = list(value) if isinstance(value, tuple) else value
    return values


def from_dict(values: Mapping[str, Any]) -> Experiment:
    """Returns the inverse of ``to_dict``; missing fields have their defaults."""
    return checked_experiment(values)


def checked_experiment(value: Any) -> Experiment:
    """Returns an experiment, or its dict, with each value in the type of its field.

    Lists become tuples, and whole numbers floats, where the field has that type.  UserError names
    the field, the expected type and the value.
    """
    experiment = checked(value, Experiment)
    assert isinstance(experiment, Experiment)
    return experiment


def to_json(experiment: Experiment) -> str:
    """Returns the whole experiment, with defaults; ``from_json`` returns an equal one."""
    return json.dumps(to_dict(experiment), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(text: str | bytes) -> Experiment:
    """Returns the inverse of ``to_json``; UserError names the field that is wrong."""
    values = read_json(text, of="not the JSON of an experiment", max_bytes=MAX_BYTES)
    if not isinstance(values, dict):
        raise UserError(f"not the JSON of an experiment: {_show(values)}")
    return from_dict(values)


def method_to_json(method: MethodConfig) -> str:
    """Returns the config of a method and its class; ``method_from_json`` returns an equal one."""
    return json.dumps({CLASS: type(method).__name__} | to_dict(method), allow_nan=False)


def method_from_json(text: str, *, of: str = "a method's config") -> MethodConfig:
    """Returns the inverse of ``method_to_json``; the message of a UserError begins with ``of``."""
    value = read_json(text, of=of, max_bytes=MAX_BYTES)
    method: MethodConfig = checked(value, MethodConfig, "method")
    return method


def diff(a: Experiment, b: Experiment) -> list[str]:
    """Returns the fields that differ, one line each: ``optimizer.learning_rate: 0.3 -> 0.1``.

    Two different methods are compared by the fields that both have.
    """
    old, new = dict(_leaves(to_dict(a))), dict(_leaves(to_dict(b)))
    return [
        f"{path.removesuffix('.' + CLASS)}: {json_text(old[path])} -> {json_text(new[path])}"
        for path in old
        if path in new and old[path] != new[path]
    ]


def checked(value: Any, annotation: Any, path: str = "") -> Any:
    """Returns the value as the annotated type, with each field of a dataclass checked.

    A dataclass may be given as a dict, a tuple as a list and a float as a whole number.  UserError
    names the path, the expected type and the value.
    """
    if classes := group_classes(annotation):
        return _checked_group(value, classes, path)
    if get_origin(annotation) is tuple:
        if isinstance(value, list | tuple):
            return tuple(checked(item, get_args(annotation)[0], path) for item in value)
    elif get_origin(annotation) is Literal:
        if isinstance(value, str) and value in get_args(annotation):
            return value
        choices = suggest(str(value), map(str, get_args(annotation)))
        raise UserError(f"{path} cannot be {_show(value)}: {choices}")
    elif annotation is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value):
            return float(value)
    elif annotation is str:
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        if isinstance(value, str) and _is_utf8(value):
            return value
    elif type(value) is annotation:
        return value
    raise UserError(f"{path}: expected {_described(annotation)}, got {_show(value)}")


def group_classes(annotation: Any) -> tuple[type, ...]:
    """Returns the dataclasses that a field of this type may hold; empty for a plain value."""
    if annotation is MethodConfig:
        return tuple(METHODS.values())
    is_group = isinstance(annotation, type) and dataclasses.is_dataclass(annotation)
    return (annotation,) if is_group else ()


def _checked_group(value: Any, classes: tuple[type, ...], path: str) -> Any:
    by_name = {cls.__name__: cls for cls in classes}
    if isinstance(value, Mapping):
        values = dict(value)
        name = values.pop(CLASS, classes[0].__name__ if len(classes) == 1 else None)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        values = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        name = type(value).__name__
    else:
        raise UserError(
            f"{path or 'experiment'}: expected {' or '.join(by_name)}, got {_show(value)}"
        )
    if not isinstance(name, str) or name not in by_name:
        raise UserError(f"{path}: expected {' or '.join(by_name)}, got {name or 'no class'}")
    cls = by_name[name]
    hints = field_types(cls)
    prefix = f"{path}." if path else ""
    for key in values:
        if key not in hints:
            raise UserError(f"there is no field {prefix + key!r}: {suggest(key, hints)}")
    return cls(**{key: checked(v, hints[key], prefix + key) for key, v in values.items()})


def _read(text: str, annotation: Any, path: str) -> Any:
    """Returns the text as a value of the annotated type; the text itself if it is not one."""
    if annotation is MethodConfig:
        if (name := text.strip().lower()) in METHODS:
            return METHODS[name]()
        raise UserError(f"{path} cannot be {_show(text)}: {_suggest_method(text)}")
    if group_classes(annotation):
        names = ", ".join(f"{path}.{name}" for name in field_types(annotation))
        raise UserError(f"{path} is a group of fields; set one of {names}")
    if get_origin(annotation) is tuple:
        return _read_tuple(text.strip(), get_args(annotation)[0], path)
    if annotation is bool:
        return {"true": True, "false": False}.get(text.strip().lower(), text)
    if annotation in (int, float):
        try:
            return annotation(text)
        except ValueError:
            return text
    return text


def _suggest_method(text: str) -> str:
    """Returns the method that was probably meant, and all methods."""
    name = text.strip().lower().replace("-", "_")
    return suggest(_ALIASES.get(name, name), METHODS, most=len(METHODS))


def _read_tuple(text: str, item: Any, path: str) -> Any:
    if text.startswith("["):
        try:
            return read_json(text, of=path)
        except UserError:
            inner = text[1:-1]
            # [a,b], without quotes; other brackets belong to a regular expression or a label.
            if text.endswith("]") and not {"[", "]"} & {*inner}:
                text = inner
    parts = [part.strip() for part in text.split(",")]
    if parts[-1] == "":  # an empty text, or a trailing comma
        parts.pop()
    return [_read(part, item, path) for part in parts]


def _has_field(config: Any, name: str) -> bool:
    return any(field.name == name for field in dataclasses.fields(config))


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _no_such_field(path: str, experiment: Experiment) -> str:
    """Returns a message with the nearest paths, whether the group or the field is misspelled."""
    *groups, name = path.split(".")
    known = [p for p, _ in _leaves(to_dict(experiment)) if not p.endswith("." + CLASS)]

    def alike(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a, b).ratio()

    scores = {p: (alike(path, p) + alike(name, p.rpartition(".")[2])) / 2 for p in known}
    best = max(scores.values())
    # First the same name in another group, then similar names.
    elsewhere = [p for p in known if name and p.rpartition(".")[2] == name]
    group = ".".join(groups)
    near = [repr(p) for p in elsewhere]
    near += [
        repr(p)
        for p in known
        if p not in elsewhere
        and scores[p] > max(0.6, best - 0.05)
        and (not elsewhere or p.rpartition(".")[0] == group)
    ]
    if near:
        return f"there is no field {path!r}; did you mean {' or '.join(near[:3])}?"
    owner = getattr(experiment, groups[0], None) if groups else experiment
    if not dataclasses.is_dataclass(owner):
        owner = experiment
    names = ", ".join(field.name for field in dataclasses.fields(owner))
    return f"there is no field {path!r}; {type(owner).__name__} has {names or 'no fields'}"


def _described(annotation: Any) -> str:
    if get_origin(annotation) is tuple:
        item = get_args(annotation)[0]
        named = {int: "whole numbers such as 0,1,2", float: "numbers such as 0.1,0.3"}
        return f"a list of {named.get(item, 'texts such as a,b or a JSON list')}"
    return {
        bool: "true or false",
        int: "a whole number",
        float: "a finite number",
        str: "a text",
    }.get(annotation, str(annotation))


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number too large for a float
        return False


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _show(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
