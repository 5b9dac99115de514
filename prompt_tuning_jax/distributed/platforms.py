"""Which of JAX's platforms are looked for."""

import importlib.metadata
import importlib.util
import os
from pathlib import Path

# As jax/_src/hardware_utils.py has them.
_GOOGLE_PCI_VENDOR = "0x1ae0"
_GPU_DEVICES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
_TPU_VARIABLES = ("JAX_FORCE_TPU_INIT", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES")


def leave_out_missing_tpu() -> None:
    """Tells JAX not to try a TPU where libtpu is installed, for ``plan`` say, and there is none.

    libtpu would print its errors.  Must come before JAX is imported; what the user has set stays.
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
