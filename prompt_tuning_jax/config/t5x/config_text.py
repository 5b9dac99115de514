"""A translation as the text of a config file."""

import textwrap
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.config.t5x.translation import Remark, Setting, Translation
from prompt_tuning_jax.errors import printable

_WIDTH = 100
_HEADINGS = {
    "missing": "Values that the launch does not give",
    "changed": "Bindings with another meaning",
    "lost": "Bindings without a counterpart",
}


def remarks_by_kind(t: Translation) -> Iterator[tuple[str, list[Remark]]]:
    """Yields the remarks under their headings, in the order of ``_HEADINGS``."""
    for kind, heading in _HEADINGS.items():
        if remarks := [remark for remark in t.remarks if remark.kind == kind]:
            yield heading, remarks


def config_text(t: Translation, *, path: str, files: list[str]) -> str:
    """Returns the Python source of a config file with ``get_config()``.

    Every value is written as a literal, and every text of a gin file in a comment of one line.
    """
    groups = [f.name for f in fields(Experiment) if f.name == "method" or f.name in t.settings]
    classes = {name: name.capitalize() for name in groups} | {"method": t.method}
    imported = sorted(["Experiment", *(classes[g] for g in groups if g != "method")])
    shown = ", ".join(files) or "flags"
    lines = [
        '"""Imported from gin files of T5X.',
        "",
        *_wrapped(f"prompt-tuning {launch_command(t, path)}", ""),
        '"""',
        "",
        *_wrapped(
            f"From {shown}.  The comment beside a field is the binding that it comes from.", "# "
        ),
    ]
    for heading, remarks in remarks_by_kind(t):
        lines += ["#", f"# {heading}:"]
        for remark in remarks:
            where = f" ({remark.where})" if remark.where else ""
            lines += _wrapped(f"{remark.binding}{where}: {remark.text}", "#   ", "#     ")
    lines += ["", *_import("prompt_tuning_jax.config.experiment", imported)]
    lines += _import("prompt_tuning_jax.config.methods", [t.method])
    lines += ["", "", "def get_config() -> Experiment:", "    return Experiment("]
    for group in groups:
        lines += _group(group, classes[group], t.settings.get(group, {}))
    return "\n".join([*lines, "    )", ""])


def launch_command(t: Translation, path: str) -> str:
    """Returns the command that does what the launch does, without ``prompt-tuning``."""
    first = f"predict --config {path}" if t.command == "predict" else f"{t.command} {path}"
    options = t.options
    if t.command in ("eval", "predict"):
        options = options or ["--prompt PROMPT"]
    rest = ["--input FILE"] if t.command == "predict" else []
    return " ".join([first, *options, *rest])


def _import(module: str, names: list[str]) -> list[str]:
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= _WIDTH:
        return [line]
    return [f"from {module} import (", *(f"    {name}," for name in names), ")"]


def _group(group: str, cls: str, settings: dict[str, Setting]) -> Iterator[str]:
    if not settings:
        yield f"        {group}={cls}(),"
        return
    yield f"        {group}={cls}("
    for name, setting in settings.items():
        if setting.remark:
            yield from _wrapped(f"{setting.source}: {setting.remark}", " " * 12 + "# ")
        line = f"            {name}={_literal(setting.value)},"
        beside = f"{line}  # {printable(setting.source)}"
        fits = setting.source and not setting.remark and len(beside) <= _WIDTH
        if setting.source and not setting.remark and not fits:
            yield from _wrapped(setting.source, " " * 12 + "# ")
        yield beside if fits else line
    yield "        ),"


def _literal(value: Any) -> str:
    text = repr(value)
    if isinstance(value, str):
        # As formatters write it.
        text = f'"{text[1:-1]}"' if text[0] == "'" and '"' not in text else text
    elif isinstance(value, tuple):
        inner = ", ".join(map(_literal, value))
        text = f"({inner},)" if len(value) == 1 else f"({inner})"
    elif isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 100_000:
        text = f"{value:_}"
    return text


def _wrapped(text: str, first: str, rest: str | None = None) -> list[str]:
    """Returns a text in several lines, free of what could end a comment or a docstring."""
    safe = printable(text).replace("\\", "/").replace('"""', "'''")
    rest = first if rest is None else rest
    return textwrap.wrap(
        safe, _WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False
    ) or [first.rstrip()]
