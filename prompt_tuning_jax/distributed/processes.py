"""Several processes as one program: how they find each other, and how they stop together.

Each process runs the same code on its local devices.  Besides JAX's collectives, processes use the
key-value store of JAX's coordination service, which process 0 runs.  Through it they report that
they are alive, that they have failed, or that they have received a signal.
"""

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prompt_tuning_jax.distributed.heartbeat import Heartbeat, first_line
from prompt_tuning_jax.errors import UserError

SILENCE_SECONDS = 60.0  # without a heartbeat, until a process counts as dead
_START_SECONDS = 300
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The number of processes, and how they find each other.

    TPU pods, SLURM and indexed Kubernetes jobs need none of these fields.  With ``count`` 1, this
    process runs alone, whatever its environment.
    """

    coordinator_address: str | None = None  # host:port of process 0
    count: int | None = None
    index: int | None = None
    silence_seconds: float = SILENCE_SECONDS


_HEARTBEAT: ContextVar[Heartbeat | None] = ContextVar("heartbeat of this process", default=None)


def is_primary() -> bool:
    """Returns whether this is process 0, which writes files and prints."""
    import jax

    return bool(jax.process_index() == 0)


def process_count() -> int:
    """Returns the number of processes of this program."""
    import jax

    return int(jax.process_count())


def several_are_meant(processes: Processes) -> bool:
    """Returns whether the flags or the environment indicate several processes.

    Raises UserError if the flags are incomplete or invalid, or if an indexed Kubernetes job lacks
    the package ``kubernetes``.
    """
    given = (processes.coordinator_address, processes.count, processes.index)
    if processes.count == 1 and processes.index in (None, 0):
        return False
    if any(flag is not None for flag in given):
        if any(flag is None for flag in given):
            raise UserError(
                "--coordinator_address, --process_count and --process_index go together: give the "
                "host:port of process 0, the number of processes and the index of this one"
            )
        address, count, index = given
        if not 0 <= int(index or 0) < int(count or 0):
            raise UserError(
                f"--process_index {index}: must be from 0 to {int(count or 0) - 1} with "
                f"--process_count {count}"
            )
        host, _, port = str(address).rpartition(":")
        if not host or not port.isdecimal():
            raise UserError(f"--coordinator_address {address}: must be HOST:PORT")
        return True
    environment = os.environ
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in environment for name in slurm):
        # Prefer the step's count: in the shell of an allocation, SLURM_NTASKS is that of the job.
        return int(environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"]) > 1
    if _tpu_hosts() > 1:
        return True
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        try:
            import kubernetes  # type: ignore[import-not-found, unused-ignore]  # noqa: F401
        except ImportError:
            raise UserError(
                "this pod belongs to an indexed Kubernetes job: pip install kubernetes so that its "
                "processes find each other, or give --process_count 1 to run this one alone"
            ) from None
        return True
    return False


@contextmanager
def started(processes: Processes) -> Iterator[None]:
    """Joins the other processes, if there are any, for the duration of the context.

    Enter it before anything makes JAX look for devices.  An error in any process ends all of them:
    the context prints it and exits Python with status 1, or 2 for a UserError.  It skips the
    orderly shutdown, which would wait for processes that no longer exist.  Raises UserError if this
    process cannot join the others.
    """
    if not several_are_meant(processes):
        yield
        return
    import jax

    # The service would swallow SIGTERM; the training loop itself agrees on a step to stop at.
    jax.config.update("jax_enable_preemption_service", False)
    by_flags = processes.count is not None
    try:
        jax.distributed.initialize(
            processes.coordinator_address,
            processes.count,
            processes.index,
            cluster_detection_method="deactivate" if by_flags else None,
            initialization_timeout=_START_SECONDS,
            # Our heartbeat is faster and more informative; JAX's covers the case that Python hangs.
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
    heartbeat = Heartbeat(
        client=_client(),
        index=jax.process_index(),
        count=jax.process_count(),
        silence_seconds=processes.silence_seconds,
    )
    token = _HEARTBEAT.set(heartbeat)
    heartbeat.start()
    try:
        yield
    except SystemExit as leaving:
        if leaving.code:
            raise  # a signal stopped the run: every process exits this way
    except BaseException as error:
        heartbeat.fail(error)
    finally:
        _HEARTBEAT.reset(token)
        heartbeat.finish()
    # Waits for the others, because process 0 may still be writing.
    jax.distributed.shutdown()


def primary_first(action: Callable[[], None], what: str) -> None:
    """Runs ``action`` in process 0 while the others wait."""
    if is_primary():
        action()
    barrier(what)


def barrier(what: str) -> None:
    """Waits until every process has reached this call."""
    if process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def require_same(what: str, text: str) -> None:
    """Raises UserError in every process unless all of them pass the same text."""
    if process_count() == 1:
        return
    import hashlib

    import numpy as np
    from jax.experimental import multihost_utils

    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    all_ND = np.asarray(multihost_utils.process_allgather(digest)).reshape(process_count(), -1)
    differing = [str(i) for i, other in enumerate(all_ND) if not np.array_equal(other, all_ND[0])]
    if differing:
        raise UserError(
            f"{what} of process {', '.join(differing)} differs from that of process 0: run the "
            "same command with the same files and versions in all processes"
        )


def stop_agreement(received: list[int], *, start: int) -> Callable[[int], int]:
    """Returns a function step -> signal that ends all processes after that step, or 0 for none.

    ``received`` is the list of signals that this process has received so far; the caller appends to
    it.  ``start`` is the step that the loop resumes from.
    """
    heartbeat = _HEARTBEAT.get()
    if heartbeat is None:
        return lambda step: received[0] if received else 0
    return heartbeat.agree_on(received, start)


def _client() -> Any:
    from jax._src import distributed

    return distributed.global_state.client


def _tpu_hosts() -> int:
    """Returns the number of hosts of this machine's TPU, or 0 without a TPU."""
    named = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    slices = int(os.environ.get("MEGASCALE_NUM_SLICES") or 1)
    if named is not None:
        return len(named.split(",")) * slices
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    if not chips or "TPU_SKIP_MDS_QUERY" in os.environ:
        return 0
    import urllib.request

    request = urllib.request.Request(
        f"{_METADATA}worker-network-endpoints", headers={"Metadata-Flavor": "Google"}
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            hosts = len(response.read().decode().split(","))
        if slices == 1:
            request.full_url = f"{_METADATA}tpu-env"
            with urllib.request.urlopen(request, timeout=5) as response:
                for line in response.read().decode().splitlines():
                    name, _, value = line.partition(":")
                    if name.strip() == "MEGASCALE_NUM_SLICES":
                        slices = int(value.strip().strip("'"))
    except (OSError, ValueError):
        return 0  # for instance, a passed-through GPU in /dev/vfio
    return hosts * slices


# As in jax/_src/hardware_utils.py.
_GOOGLE_PCI_VENDOR = "0x1ae0"
_GPU_DEVICES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
_TPU_VARIABLES = ("JAX_FORCE_TPU_INIT", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES")


def leave_out_missing_tpu() -> None:
    """Keeps JAX from trying libtpu, which ``plan`` needs, on a machine without a TPU.

    Without this call, libtpu prints errors there.  Call it before importing JAX.  It does not
    change ``JAX_PLATFORMS`` if the user has set it.
    """
    if "JAX_PLATFORMS" in os.environ or importlib.util.find_spec("libtpu") is None:
        return
    others = importlib.metadata.entry_points(group="jax_plugins")
    if not (_has_tpu() or others or any(map(os.path.exists, _GPU_DEVICES))):
        os.environ["JAX_PLATFORMS"] = "cpu"


def _has_tpu() -> bool:
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    if chips or any(name in os.environ for name in _TPU_VARIABLES):
        return True
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(vendor.read_text().strip() == _GOOGLE_PCI_VENDOR for vendor in vendors)
