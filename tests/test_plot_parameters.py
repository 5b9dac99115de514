"""The counts behind the picture of parameters against model size."""

from pathlib import Path
from typing import Any

import pytest

from prompt_tuning_jax.models.t5.config import PRESETS
from tests.script import load_script


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script("plot_parameters")


def test_counts_are_the_closed_forms_of_the_docstrings(script: Any) -> None:
    config = PRESETS["small"]
    width, inner = config.embed_dim, config.num_heads * config.head_dim
    layers = config.num_encoder_layers
    attentions = 3 * layers  # the encoder's, and two in each of as many decoder layers
    expected = {
        "model tuning": 76_961_152,
        "adapters, width 64": 5 * layers * (2 * width * 64 + 64 + width),
        "LoRA, rank 8": 2 * 8 * (width + inner) * attentions,
        "WARP, 8": (8 + 2) * width,
        # Both M = D: P*D + 10*M*D + 36*M**2 + 34*M + D.
        "P-tuning, 20, LSTM in training": 20 * width + 46 * width**2 + 35 * width,
        "prefix tuning, 100, MLP in training": 3
        * (100 * width + (width + 1) * 512 + (512 + 1) * 2 * layers * inner),
    }
    for length in (1, 20, 50, 100):
        expected[f"prompt tuning, {length}"] = length * width
        expected[f"prefix tuning, {length}"] = 2 * length * inner * attentions
    found = script.counts_of([line.method for line in script.LINES], config)
    assert dict(zip((line.label for line in script.LINES), found, strict=True)) == expected


def test_the_picture_and_the_table_are_of_all_lines(script: Any, tmp_path: Path) -> None:
    sizes = [10**n for n in range(8, 13)]
    counts = {
        line.label: [total // (1 + at) for total in sizes] for at, line in enumerate(script.LINES)
    }
    script.plot(counts, sizes, tmp_path / "made.png")
    assert (tmp_path / "made.png").read_bytes().startswith(b"\x89PNG")
    head, _, *rows = script.table(counts, sizes).splitlines()
    assert len(rows) == len(script.LINES) and "xxl (1e+03 B)" in head
    assert rows[1].endswith("500,000,000,000 (50 %) |")


@pytest.mark.parametrize(
    ("percent", "shown"), [(100.0, "100"), (1.04, "1.0"), (0.13, "0.13"), (0.0000368, "0.000037")]
)
def test_a_share_is_never_written_as_a_power_of_ten(
    script: Any, percent: float, shown: str
) -> None:
    assert script._shown(percent) == shown
