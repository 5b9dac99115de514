"""What orbax prints of an error beside raising it, kept from the terminal.

When a file is damaged or the disk is full, orbax raises, which is all that is needed, and then its
threads and TensorStore's callbacks print tracebacks of their own, some of them later: callbacks
into an event loop that is closed by then, asyncio's tasks whose errors nobody fetched.
"""

import functools
import logging
import sys
import warnings
from pathlib import Path

_IN_LOGS = (
    ("asyncio", "Task exception was never retrieved"),
    ("asyncio", "Future exception was never retrieved"),
    ("absl", "_SignalingThread.run() raised an exception"),
    ("", "TensorStore data files not found in checkpoint path"),
)


@functools.cache
def silence_orbax() -> None:
    """Drops these reports, and no others, from now on; they may come after orbax has returned."""
    for name, beginning in _IN_LOGS:
        logging.getLogger(name or None).addFilter(functools.partial(_passes, beginning=beginning))
    warnings.filterwarnings(
        "ignore", "coroutine '_read_array_index_and_device_put' was never awaited", RuntimeWarning
    )
    report = sys.unraisablehook

    def unraisablehook(unraisable: "sys.UnraisableHookArgs") -> None:
        if not _is_late_callback(unraisable):
            report(unraisable)

    sys.unraisablehook = unraisablehook


def _passes(record: logging.LogRecord, *, beginning: str) -> bool:
    return beginning not in record.getMessage()


def _is_late_callback(unraisable: "sys.UnraisableHookArgs") -> bool:
    """Whether TensorStore called into an event loop that is closed, or orbax left a coroutine."""
    code = getattr(unraisable.object, "cr_code", None)
    if code is not None:
        return "orbax" in Path(code.co_filename).parts
    return unraisable.object is None and str(unraisable.exc_value) == "Event loop is closed"
