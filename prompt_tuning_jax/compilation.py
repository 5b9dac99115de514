"""Compiled programs: kept on disk from one command to the next, and made before they are needed."""

import hashlib
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from prompt_tuning_jax.storage import user_cache

_MAX_BYTES = 2 * 2**30
_CPU_INFO = Path("/proc/cpuinfo")


def keep_compiled_programs() -> None:
    """Turns JAX's persistent cache on, unless the user has said where it is or that there is none.

    ``$XDG_CACHE_HOME/prompt_tuning_jax/compiled``, at most 2 GiB, the least recently used go first.
    JAX_COMPILATION_CACHE_DIR names another folder; JAX_ENABLE_COMPILATION_CACHE=false is without.
    """
    if not jax.config.values["jax_enable_compilation_cache"]:
        return
    if jax.config.values["jax_compilation_cache_dir"]:
        return
    # A home can be shared by machines whose processors differ, and programs are made for one.
    folder = user_cache("compiled") / _processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # a read-only home: compile each time
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", _MAX_BYTES)


class CompiledAhead:
    """A jitted function that is compiled for all shapes of its last argument at once, in threads.

    It starts with the first call, for all its shapes.  Calls of a shape that was named run its
    program, waiting for it if need be; others compile as they would have.
    """

    def __init__(self, function: Any, lasts: Sequence[Any]) -> None:
        """``function`` is jitted; ``lasts`` is its last argument, once for each shape."""
        self._function = function
        self._waiting = {_shapes(last): last for last in lasts}
        self._made: dict[Any, Future[tuple[Any, Callable[..., Any]]]] = {}

    def __call__(self, *arguments: Any) -> Any:
        made = self._program(arguments)
        return self._function(*arguments) if made is None else made.result()[1](*arguments)

    def lower(self, *arguments: Any) -> Any:
        """The function lowered for these arguments."""
        made = self._program(arguments)
        return self._function.lower(*arguments) if made is None else made.result()[0]

    def _program(self, arguments: tuple[Any, ...]) -> Future[tuple[Any, Callable[..., Any]]] | None:
        shapes = _shapes(arguments[-1])
        if self._waiting and shapes in self._waiting:
            # Shapes alone: the arrays may be donated before all have been looked at.
            others = jax.tree.map(jax.typeof, arguments[:-1])
            threads = ThreadPoolExecutor(thread_name_prefix="compile")
            waiting, self._waiting = self._waiting, {}
            for own in sorted(waiting, key=lambda own: own != shapes):
                self._made[own] = threads.submit(self._make, (*others, waiting[own]))
            threads.shutdown(wait=False)
        return self._made.get(shapes)

    def _make(self, arguments: tuple[Any, ...]) -> tuple[Any, Callable[..., Any]]:
        lowered = self._function.lower(*arguments)
        return lowered, lowered.compile()


def _shapes(argument: Any) -> Any:
    leaves, structure = jax.tree.flatten(argument)
    return structure, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)


def _processor() -> str:
    """Tells kinds of processors apart."""
    about = platform.machine()
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
        about += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        pass  # not Linux
    return hashlib.sha256(about.encode()).hexdigest()[:12]
