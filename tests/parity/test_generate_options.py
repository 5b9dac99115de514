"""Generation with a model's own ids and with logits processors against transformers.

``transformers_generate.jsonl`` holds what transformers 5.24 wrote with the model in
``reports/checkpoints/model``, a line per config and options: ``generate(inputs, attention_mask,
max_new_tokens=12)``, greedy and with three beams, each row up to its end; and the
log-probabilities of ``labels``.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prompt_tuning_jax.checkpoints.load import load_model
from prompt_tuning_jax.inference.api import generate, score
from prompt_tuning_jax.models.t5.model import T5

LINES = Path(__file__).with_name("transformers_generate.jsonl").read_text().splitlines()
RECORDED = [json.loads(line) for line in LINES]
LENGTH = 12


def name_of(case: dict[str, Any]) -> str:
    return " ".join(f"{k}={v}" for k, v in {**case["config"], **case["options"]}.items()) or "t5"


@pytest.fixture(scope="module")
def model_of(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, T5] = {}

    def of(config: dict[str, int]) -> T5:
        key = json.dumps(config)
        if key not in made:
            folder = tmp_path_factory.mktemp("model")
            source = shared / "reports" / "checkpoints" / "model"
            if not source.is_dir():
                pytest.skip(f"no folder {source}")
            shutil.copytree(source, folder, dirs_exist_ok=True)
            raw = json.loads((source / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(raw | config))
            made[key] = load_model(str(folder))
        return made[key]

    return of


@pytest.mark.parametrize("case", RECORDED, ids=name_of)
def test_same_ids_as_transformers(case: dict[str, Any], model_of: Any) -> None:
    model = model_of(case["config"])
    inputs, options = np.asarray(case["inputs"]), case["options"]
    pad = case["config"].get("pad_token_id", 0)

    def padded(rows: list[list[int]]) -> list[list[int]]:
        return [row + [pad] * (LENGTH - len(row)) for row in rows]

    written = generate(model, inputs, max_length=LENGTH, **options)
    assert written.ids.tolist() == padded(case["greedy"])
    beams = generate(
        model, inputs, None, "beam", num_beams=3, beam_rule="hf", max_length=LENGTH, **options
    )
    assert beams.ids[:, 0].tolist() == padded(case["beam"])
    np.testing.assert_allclose(beams.scores[:, 0], case["beam_scores"], atol=1e-4)
    if "labels" in case:
        width = max(map(len, case["labels"]))
        labels = np.asarray([row + [pad] * (width - len(row)) for row in case["labels"]])
        np.testing.assert_allclose(score(model, inputs, labels), case["scores"], atol=1e-3)
