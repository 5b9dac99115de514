"""Several processes as one program: how they find each other, and how they stop together.

Each process runs the same code on its own devices.  What they say to each other besides JAX's
collectives goes through the key-value store of JAX's coordination service, which process 0 runs:
that they are alive, that one has failed, that one was asked to stop.
"""

import os
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prompt_tuning_jax.distributed.heartbeat import Watch, first_line
from prompt_tuning_jax.errors import UserError

SILENCE_SECONDS = 60.0  # without a sign of life before a process counts as dead
_START_SECONDS = 300
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


@dataclass(frozen=True, kw_only=True)
class Processes:
    """How many processes there are meant to be, and how they find each other.

    None of it is needed on TPU pods, under SLURM and in indexed Kubernetes jobs; ``count`` 1 means
    this process alone, whatever surrounds it.
    """

    coordinator_address: str | None = None  # host:port of process 0
    count: int | None = None
    index: int | None = None
    silence_seconds: float = SILENCE_SECONDS


_WATCH: "ContextVar[Watch | None]" = ContextVar(
    "this process's watch over the others", default=None
)


def is_primary() -> bool:
    """Whether this process is the one that writes files and speaks."""
    import jax

    return bool(jax.process_index() == 0)


def process_count() -> int:
    """The number of processes of this program."""
    import jax

    return int(jax.process_count())


def several_are_meant(processes: Processes) -> bool:
    """Whether flags or surroundings say that this is one of several processes.

    UserError for flags that do not go together.
    """
    given = (processes.coordinator_address, processes.count, processes.index)
    if processes.count == 1 and processes.index in (None, 0):
        return False
    if any(flag is not None for flag in given):
        if any(flag is None for flag in given):
            raise UserError(
                "--coordinator_address, --process_count and --process_index go together: "
                "host:port of process 0, how many there are, and which one this is"
            )
        address, count, index = given
        if not 0 <= int(index or 0) < int(count or 0):
            raise UserError(
                f"--process_index {index} of --process_count {count}: indices are from 0"
            )
        host, _, port = str(address).rpartition(":")
        if not host or not port.isdecimal():
            raise UserError(f"--coordinator_address {address} is not of the form host:port")
        return True
    environment = os.environ
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in environment for name in slurm):
        # The step's own number, where it is told: a shell in an allocation has the job's.
        return int(environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"]) > 1
    if _tpu_hosts() > 1:
        return True
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        try:
            import kubernetes  # type: ignore[import-not-found, unused-ignore]  # noqa: F401
        except ImportError:
            raise UserError(
                "this is a pod of an indexed Kubernetes job: pip install kubernetes, so that its "
                "processes find each other, or give --process_count 1 to run this one alone"
            ) from None
        return True
    return False


@contextmanager
def started(processes: Processes) -> Iterator[None]:
    """Within, this process is one of several where that is meant; else nothing happens.

    Must come before anything that makes JAX look for devices.  An error inside, in any of the
    processes, ends all of them: this context then prints it and leaves Python at once with status
    1, 2 for a UserError, because an orderly end would wait for those that are gone.
    """
    if not several_are_meant(processes):
        yield
        return
    import jax

    # It would swallow SIGTERM, in every phase of a run; the loop agrees on a step by itself.
    jax.config.update("jax_enable_preemption_service", False)
    by_flags = processes.count is not None
    try:
        jax.distributed.initialize(
            processes.coordinator_address,
            processes.count,
            processes.index,
            cluster_detection_method="deactivate" if by_flags else None,
            initialization_timeout=_START_SECONDS,
            # Ours is the shorter one and says more; this one is for the case that Python hangs.
            heartbeat_timeout_seconds=int(2 * processes.silence_seconds) + 10,
        )
    except Exception as error:
        raise UserError(
            f"cannot join the other processes: {first_line(error)}; check --coordinator_address, "
            "--process_count and --process_index"
        ) from None
    if jax.process_count() == 1:
        yield
        return
    watch = Watch(
        client=_client(),
        index=jax.process_index(),
        count=jax.process_count(),
        silence_seconds=processes.silence_seconds,
    )
    token = _WATCH.set(watch)
    watch.start()
    try:
        yield
    except SystemExit as leaving:
        if leaving.code:
            raise  # all of them leave so: a run that was asked to stop
    except BaseException as error:
        watch.fail(error)
    finally:
        _WATCH.reset(token)
        watch.finish()
    # Waits for the others: process 0 may still be writing.
    jax.distributed.shutdown()


def primary_first(action: Callable[[], None], what: str) -> None:
    """``action`` by process 0 while the others wait, for what only one may do."""
    if is_primary():
        action()
    barrier(what)


def barrier(what: str) -> None:
    """Waits until every process has come here."""
    if process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def require_same(what: str, text: str) -> None:
    """UserError, in every process, unless all of them have the same text here."""
    if process_count() == 1:
        return
    import hashlib

    import numpy as np
    from jax.experimental import multihost_utils

    own = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    all_ND = np.asarray(multihost_utils.process_allgather(own)).reshape(process_count(), -1)
    differing = [str(i) for i, other in enumerate(all_ND) if not np.array_equal(other, all_ND[0])]
    if differing:
        raise UserError(
            f"{what} of process {', '.join(differing)} differs from that of process 0: give all "
            "processes the same command, files and versions"
        )


def stop_agreement(received: list[int], *, start: int) -> Callable[[int], int]:
    """``step -> number of the signal to stop by after it``, or 0; the same for all processes.

    ``received`` is filled with the signals of this process; ``start`` is the step to go on from.
    """
    watch = _WATCH.get()
    if watch is None:
        return lambda step: received[0] if received else 0
    return watch.agree_on(received, start)


def _client() -> Any:
    from jax._src import distributed

    return distributed.global_state.client


def _tpu_hosts() -> int:
    """How many hosts the TPU of this machine belongs to; 0 where there is none."""
    named = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    slices = int(os.environ.get("MEGASCALE_NUM_SLICES") or 1)
    if named is not None:
        return len(named.split(",")) * slices
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    if not chips or "TPU_SKIP_MDS_QUERY" in os.environ:
        return 0
    request = urllib.request.Request(
        f"{_METADATA}worker-network-endpoints", headers={"Metadata-Flavor": "Google"}
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            hosts = len(answer.read().decode().split(","))
        if slices == 1:
            request.full_url = f"{_METADATA}tpu-env"
            with urllib.request.urlopen(request, timeout=5) as answer:
                for line in answer.read().decode().splitlines():
                    name, _, value = line.partition(":")
                    if name.strip() == "MEGASCALE_NUM_SLICES":
                        slices = int(value.strip().strip("'"))
    except (OSError, ValueError):
        return 0  # a GPU that is passed through, for instance
    return hosts * slices
