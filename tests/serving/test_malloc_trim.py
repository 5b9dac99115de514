"""The heap keeps what is freed: the same large piece twice is touched once."""

import os
import resource
import subprocess
import sys

import pytest

_SCRIPT = """
import resource, sys, threading
import numpy as np
from prompt_tuning_jax.serving.malloc_trim import keep_freed_memory

assert keep_freed_memory() is (sys.argv[1] == "cpu")

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty(100_000_000, np.uint8)[::4096] = 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

found = []
thread = threading.Thread(target=lambda: found.extend([faults(), faults()]))
thread.start()
thread.join()
print(*found)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is Linux's")
@pytest.mark.parametrize("platforms", ["cpu", "tpu,cpu"])
def test_what_is_freed_is_kept_where_jax_computes_on_the_host(platforms: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, platforms],
        env={**os.environ, "JAX_PLATFORMS": platforms},
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = map(int, done.stdout.split())
    pages = 100_000_000 // resource.getpagesize()
    kept = platforms == "cpu"
    # Large pages make for fewer faults, but not for none.
    assert first > pages / 1000
    assert (second < first / 100) is kept
