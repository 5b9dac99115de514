"""What is read of PEFT's options and written again gives PEFT's recorded logits in PEFT."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.peft.weights import read_peft_weights, write_peft_weights
from tests.parity.test_peft_prompts import libraries
from tests.peft_options import CASES, LOGITS, RECORDED, logits_in_peft

__all__ = ["libraries"]  # a fixture


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_gives_the_recorded_logits_in_peft(
    libraries: Any, tmp_path: Path, name: str
) -> None:
    case = CASES[name]
    config, params = case.model().config, param_tree.split(case.model())[1]
    read = read_peft_weights(RECORDED / name, config, params)
    write_peft_weights(
        tmp_path / "a", read.method, read.trainable, config=config, base_model_name_or_path="m"
    )
    got = logits_in_peft(libraries, case, tmp_path / "a", tmp_path)
    np.testing.assert_allclose(got, np.load(RECORDED / name / LOGITS), atol=2e-4)
