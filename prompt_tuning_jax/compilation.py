"""Keeps compiled programs on disk between commands, and compiles them before they are needed."""

import ctypes
import hashlib
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import jax

from prompt_tuning_jax.storage import user_cache

_MAX_BYTES = 2 * 2**30
_CPU_INFO = Path("/proc/cpuinfo")


def keep_compiled_programs() -> None:
    """Turns on JAX's persistent compilation cache, unless the user has placed or disabled it.

    The cache is in ``$XDG_CACHE_HOME/prompt_tuning_jax/compiled``.  It holds at most 2 GiB; the
    least recently used programs are removed first.  JAX_COMPILATION_CACHE_DIR selects another
    folder, and JAX_ENABLE_COMPILATION_CACHE=false disables the cache.
    """
    if not jax.config.values["jax_enable_compilation_cache"]:
        return
    if jax.config.values["jax_compilation_cache_dir"]:
        return
    # Machines with different processors can share a home, but a program fits only one processor.
    folder = user_cache("compiled") / _processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # the home is read-only: compile each time
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", _MAX_BYTES)


_COMPILED = "/jax/core/compile/backend_compile_duration"
_LONG_SECONDS = 2.0


@cache
def return_memory_of_compilers() -> None:
    """Returns to the system, after each long compilation, the memory that it has freed.

    XLA compiles with many threads, and glibc keeps what they free: 0.3 GB after the step of a model
    of 30 layers.  It also returns what is free now, for instance after reading weights.
    """
    _return_freed_memory()

    def compiled(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _COMPILED and duration_secs > _LONG_SECONDS:
            _return_freed_memory()

    jax.monitoring.register_event_duration_secs_listener(compiled)


class CompiledAhead:
    """A jitted function that threads compile for several shapes of its last argument at once.

    The first call with one of these shapes starts the compilation for all of them.  Such calls run
    the compiled program, after waiting for it if necessary.  Calls with other shapes compile as
    usual.
    """

    def __init__(self, function: Any, lasts: Sequence[Any]) -> None:
        """Wraps the jitted ``function``; ``lasts`` has one last argument per shape."""
        self._function = function
        self._waiting = {_shapes(last): last for last in lasts}
        self._made: dict[Any, Future[tuple[Any, Callable[..., Any]]]] = {}

    def __call__(self, *arguments: Any) -> Any:
        made = self._program(arguments)
        return self._function(*arguments) if made is None else made.result()[1](*arguments)

    def trace(self, *arguments: Any) -> Any:
        """Returns the function traced for these arguments."""
        self._program(arguments)  # which may compile meanwhile
        return self._function.trace(*jax.tree.map(jax.typeof, arguments))

    def lower(self, *arguments: Any) -> Any:
        """Returns the function lowered for these arguments."""
        made = self._program(arguments)
        return self._function.lower(*arguments) if made is None else made.result()[0]

    def _program(self, arguments: tuple[Any, ...]) -> Future[tuple[Any, Callable[..., Any]]] | None:
        shapes = _shapes(arguments[-1])
        if self._waiting and shapes in self._waiting:
            # Keep only shapes: a call may donate the arrays before all threads have used them.
            others = jax.tree.map(jax.typeof, arguments[:-1])
            threads = ThreadPoolExecutor(thread_name_prefix="compile")
            waiting, self._waiting = self._waiting, {}
            for other in sorted(waiting, key=lambda other: other != shapes):
                self._made[other] = threads.submit(self._make, (*others, waiting[other]))
            threads.shutdown(wait=False)
        return self._made.get(shapes)

    def _make(self, arguments: tuple[Any, ...]) -> tuple[Any, Callable[..., Any]]:
        lowered = self._function.lower(*arguments)
        compiled = lowered.compile()
        _return_freed_memory()
        return lowered, compiled


def _return_freed_memory() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # another libc may have none
    if trim is not None:
        trim(0)


def _shapes(argument: Any) -> Any:
    leaves, structure = jax.tree.flatten(argument)
    return structure, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)


def _processor() -> str:
    """Returns a digest that identifies the kind of processor."""
    about = platform.machine()
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
        about += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        pass  # not on Linux
    return hashlib.sha256(about.encode()).hexdigest()[:12]
