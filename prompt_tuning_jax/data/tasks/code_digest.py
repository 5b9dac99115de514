"""A digest of a function's code: part of the key under which its results are cached."""

import dataclasses
import functools
import hashlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from types import CodeType
from typing import Any

_PLAIN = (str, bytes, int, float, bool, type(None))


def code_digest(value: Any) -> str:
    """Returns the SHA-256 of a function and of the values that it closes over.

    Editing it changes the digest.

    A function is represented by its name and by the text of the whole module that defines it (its
    helpers are there), including partial arguments and closed-over values.  If no file defines it,
    as in a notebook, its bytecode and the globals that it uses take the place of the text.  Edits
    of other modules that it calls do not change the digest, nor does the state of objects of
    unknown types.  Memory addresses never enter, so the digest is the same in every process.
    """
    return hashlib.sha256(_describe(value, depth=0).encode(errors="replace")).hexdigest()


def _describe(value: Any, depth: int) -> str:
    if isinstance(value, _PLAIN):
        return repr(value)
    if depth > 8:  # probably a cycle
        return "..."
    if isinstance(value, functools.partial):
        parts = [value.func, *value.args, value.keywords]
        return f"partial({_describe_all(parts, depth)})"
    if isinstance(value, Mapping):
        items = [f"{key!r}: {_describe(item, depth + 1)}" for key, item in value.items()]
        return "{" + ", ".join(items) + "}"
    if isinstance(value, list | tuple):
        return f"({_describe_all(value, depth)})"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(_describe(item, depth + 1) for item in value)) + "}"
    if dataclasses.is_dataclass(value) and not inspect.isclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return f"{_describe(type(value), depth)}{_describe(fields, depth)}"
    if hasattr(value, "__wrapped__"):  # for instance by functools.cache
        return f"wrapped({_describe(value.__wrapped__, depth + 1)})"
    if inspect.ismethod(value):
        return f"{_describe(value.__func__, depth)} of {type(value.__self__).__qualname__}"
    if inspect.isfunction(value):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
        parts = [value.__defaults__, value.__kwdefaults__, *cells]
        digest = _module_digest(value)
        if not digest:
            known = value.__globals__
            names = sorted(_names(value.__code__))
            parts += [value.__code__, {name: known[name] for name in names if name in known}]
        return f"{value.__module__}.{value.__qualname__}@{digest}[{_describe_all(parts, depth)}]"
    if inspect.iscode(value):
        return f"code({_describe_all([value.co_code, value.co_names, *value.co_consts], depth)})"
    kind = value if inspect.isclass(value) else type(value)
    return f"<{kind.__module__}.{kind.__qualname__}@{_module_digest(kind)}>"


def _describe_all(values: Any, depth: int) -> str:
    return ", ".join(_describe(value, depth + 1) for value in values)


def _names(code: CodeType) -> set[str]:
    """Returns the names of globals and attributes that a function uses.

    Functions within it are included.
    """
    inner = (_names(part) for part in code.co_consts if inspect.iscode(part))
    return set(code.co_names).union(*inner)


def _filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:  # not assigned yet
        return False
    return True


def _module_digest(code: Any) -> str:
    try:
        path = inspect.getsourcefile(code)
    except TypeError:  # built-in
        return ""
    if not path or not Path(path).is_file():
        return ""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
