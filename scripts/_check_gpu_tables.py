"""The tables that ``check_gpu`` prints, and the rates of NVIDIA's cards."""

import statistics
from collections.abc import Sequence
from typing import Any

from _check_gpu_report import FAIL, SKIPPED
from _rivals import markdown

# Dense bfloat16 products in TFLOP/s by NVIDIA's datasheets; the first name that is part of what the
# driver calls the card.  A T4 and a V100 have float16 instead.
CARDS: tuple[tuple[str, float], ...] = (
    ("B200", 2250.0),
    ("GH200", 989.4),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("H100 PCIe", 756.5),
    ("H100 NVL", 835.5),
    ("H100", 989.4),
    ("H800", 989.4),
    ("A100", 311.9),
    ("A800", 311.9),
    ("A30", 165.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("A40", 149.7),
    ("RTX A6000", 154.8),
    ("RTX 6000 Ada", 364.2),
    ("L40S", 362.1),
    ("L40", 181.1),
    ("L4", 121.0),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("V100", 125.0),
    ("T4", 65.1),
)

Row = dict[str, Any]


def peak_of(device_kind: str) -> float | None:
    """Returns the datasheet's FLOP/s of a card, or None for an unknown one."""
    name = device_kind.lower()
    return next((1e12 * rate for part, rate in CARDS if part.lower() in name), None)


def tables(rows: Sequence[Row], seconds: float) -> str:
    """Returns the machine, the table of speeds and the table of checks, as Markdown."""
    of = {
        kind: [row for row in rows if row["row"] == kind] for kind in ("machine", "speed", "check")
    }
    machine = of["machine"][-1] if of["machine"] else {}
    texts = [_about(machine)] if machine else []
    if of["speed"]:
        texts.append(markdown([_speed(row, machine) for row in of["speed"]]))
    if of["check"]:
        texts.append(markdown([_check(row) for row in of["check"]]))
    number = {kind: sum(row["status"] == kind for row in of["check"]) for kind in (FAIL, SKIPPED)}
    passed = len(of["check"]) - sum(number.values())
    texts.append(
        f"{passed} checks passed, {number[FAIL]} failed, {number[SKIPPED]} skipped, in "
        f"{seconds:.0f} s"
    )
    return "\n\n".join(texts)


def _about(machine: Row) -> str:
    rates = [f"{rate / 1e12:.4g} TFLOP/s in {dtype}" for dtype, rate in machine["matmul"].items()]
    peak = peak_of(machine["device"])
    datasheet = "no datasheet is known" if peak is None else f"datasheet {peak / 1e12:.4g}"
    memory = f", {machine['memory_gb']:.0f} GB for JAX" if machine["memory_gb"] else ""
    return (
        f"{machine['device']}{memory}; jax {machine['jax']}, jaxlib {machine['jaxlib']}; one large "
        f"product: {', '.join(rates)} as by default ({datasheet} in bfloat16)"
    )


def _speed(row: Row, machine: Row) -> dict[str, str]:
    seconds = statistics.median(row["seconds"])
    rate = row["flops"] / seconds
    peak, matmul = peak_of(machine.get("device", "")), machine.get("matmul", {}).get("bfloat16")
    tokens = row.get("tokens")
    return {
        "model": row["model"].rpartition("/")[2],
        "program": row["program"],
        "T": str(row["length"]),
        "rows": str(row["rows"]),
        "ms": f"{1000 * seconds:.4g} ({1000 * min(row['seconds']):.4g} - "
        f"{1000 * max(row['seconds']):.4g})",
        "per s": f"{tokens / seconds:.4g} tokens"
        if tokens
        else f"{row['rows'] / seconds:.4g} rows",
        "TFLOP/s": f"{rate / 1e12:.4g}" if rate else "",
        "% of datasheet": f"{100 * rate / peak:.1f}" if rate and peak else "",
        "% of a large product": f"{100 * rate / matmul:.1f}" if rate and matmul else "",
        "program GB": f"{row['program_gb']:.2f}",
        "peak GB": f"{row['peak_gb']:.2f}" if row["peak_gb"] else "",
        "trace + compile s": f"{row['trace_seconds']:.1f} + {row['compile_seconds']:.1f}",
    }


def _check(row: Row) -> dict[str, str]:
    return {
        "section": row["section"].rpartition("/")[2],
        "check": row["name"].replace("|", "/"),
        "status": row["status"],
        "result": row["result"].replace("|", "/"),
    }
