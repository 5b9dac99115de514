"""What reading an untrusted file may cost."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def peak_kilobytes() -> int:
    """What ``getrusage`` counts includes the process that has started this one."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = status.read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


@contextmanager
def bounded(*, seconds: float = 5, megabytes: int = 300) -> Iterator[None]:
    """Fails if the block needs more processor time or memory than this."""
    # Linux forgets the peak of all that ran before; elsewhere only a new peak is seen.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before, start = peak_kilobytes(), time.process_time()
    yield
    assert time.process_time() - start < seconds
    grown = peak_kilobytes() - before
    assert grown < megabytes * 1000, f"{grown} kB"
