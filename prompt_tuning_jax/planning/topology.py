"""TPU slices by name, without a TPU attached: their devices, and the chips' published peaks."""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prompt_tuning_jax.errors import UserError

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of chip.

    ``flops`` is in bfloat16 FLOP/s, and ``hbm_bandwidth`` in bytes/s.  ``hbm_bytes`` is the memory
    that the compiler may use, which is less than the chip has; the compiler names it in its message
    when a program is too large.  ``ici_bandwidth`` is the bytes/s out of one chip over all of its
    links; a ring along one axis of the torus uses the two links of that axis.  ``torus`` is the
    number of axes of the torus.
    """

    kind: str
    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float
    torus: int
    source: str

    @property
    def ring_bandwidth(self) -> float:
        """The bytes/s out of one chip along one axis of the torus, in both directions together."""
        return self.ici_bandwidth / self.torus


_PAGE = "cloud.google.com/tpu/docs/"
CHIPS: dict[str, Chip] = {
    chip.kind: chip
    for chip in (
        Chip(
            kind="v4",
            flops=275e12,
            hbm_bytes=int(30.75 * GIB),
            hbm_bandwidth=1228e9,
            ici_bandwidth=300e9,  # 2,400 Gbit/s
            torus=3,
            source=_PAGE + "v4",
        ),
        Chip(
            kind="v5e",
            flops=197e12,
            hbm_bytes=int(15.75 * GIB),
            hbm_bandwidth=819e9,
            ici_bandwidth=200e9,  # 1,600 Gbit/s
            torus=2,
            source=_PAGE + "v5e",
        ),
        Chip(
            kind="v5p",
            flops=459e12,
            hbm_bytes=int(95.74 * GIB),
            hbm_bandwidth=2765e9,
            ici_bandwidth=600e9,  # 4,800 Gbit/s
            torus=3,
            source=_PAGE + "v5p",
        ),
        Chip(
            kind="v6e",
            flops=918e12,
            hbm_bytes=int(31.25 * GIB),
            hbm_bandwidth=1640e9,
            ici_bandwidth=400e9,  # 3,200 Gbit/s
            torus=2,
            source=_PAGE + "v6e",
        ),
    )
}


def chip(kind: str) -> Chip:
    """Returns the chip named ``kind``; raises UserError with the known names if it is unknown."""
    if kind not in CHIPS:
        raise UserError(f"unknown TPU {kind!r}; choose from {', '.join(CHIPS)}")
    return CHIPS[kind]


# The slices that Google Cloud offers (cloud.google.com/tpu/docs), by number of chips.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")

# Keeps libtpu from querying a TPU's metadata, locking the library and printing warnings.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


@dataclass(frozen=True, kw_only=True)
class Topology:
    """A slice: ``v5e:4x4`` is sixteen chips of the kind v5e."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    def devices(self) -> Sequence[Any]:
        """Returns the slice's devices, one per chip, which can only be compiled for.

        Raises UserError if the TPU compiler is not installed or does not know the slice.
        """
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(
                "planning for a TPU needs its compiler: pip install 'prompt_tuning_jax[tpu]'"
            )
        for name, value in _NO_TPU.items():
            os.environ.setdefault(name, value)
        import jax
        from jax.experimental import topologies

        options: dict[str, Any] = {}
        if self.chip.kind == "v4":
            options["chip_config_name"] = "megacore"  # the chip's two cores form one device
        if self.chips < 4:
            options["chips_per_host_bounds"] = (*self.shape, 1)[:3]
        try:
            described = topologies.get_topology_desc(self.name, platform="tpu", **options)
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
            why = str(error).partition("\n")[0]
            raise UserError(f"--topology {self.name}: the TPU compiler rejects it: {why}") from None
        return tuple(described.devices)


def parse_topology(name: str) -> Topology:
    """Parses ``KIND:SHAPE``; raises UserError if the text is not a topology."""
    kind, colon, rest = name.partition(":")
    known = chip(kind) if kind else None
    if known is None or not colon or not re.fullmatch(r"\d+(x\d+){1,2}", rest):
        raise UserError(f"--topology is {name!r}; must be KIND:SHAPE, such as v5e:4x4 or v5p:2x2x2")
    shape = tuple(int(size) for size in rest.split("x"))
    if len(shape) != known.torus or 0 in shape:
        example = "4x4" if known.torus == 2 else "2x2x2"
        raise UserError(
            f"--topology {name}: a shape of {kind} has {known.torus} sizes of at least 1, such as "
            f"{kind}:{example}"
        )
    return Topology(name=name, chip=known, shape=shape)


def topology_of(kind: str, chips: int) -> Topology:
    """Returns the slice of this size; raises UserError with the offered sizes if there is none."""
    offered = [
        parse_topology(f"{kind}:{shape}") for shape in (_FLAT if chip(kind).torus == 2 else _CUBES)
    ]
    for each in offered:
        if each.chips == chips:
            return each
    sizes = ", ".join(str(each.chips) for each in offered)
    raise UserError(f"--chips is {chips}; {kind} comes in slices of {sizes} chips")
