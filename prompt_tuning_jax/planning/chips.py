"""The published peaks of TPU chips, per chip; the roofline's walls."""

from dataclasses import dataclass

from prompt_tuning_jax.errors import UserError

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of chip.

    ``flops`` is bfloat16 FLOP/s, ``hbm_bandwidth`` bytes/s, ``hbm_bytes`` what the compiler may use
    (it names that in its message when a program is too large; less than is built in).
    ``ici_bandwidth`` is bytes/s out of one chip over all of its links together; a ring along one
    axis of the torus has the two links of that axis.  ``torus`` is the number of its axes.
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
        """Bytes/s out of one chip along one axis of the torus, both directions in use."""
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
    """The chip called ``kind``; UserError with the known names otherwise."""
    if kind not in CHIPS:
        raise UserError(f"no TPU is called {kind!r}; known are {', '.join(CHIPS)}")
    return CHIPS[kind]
