"""What is read back from a run's folder."""

from pathlib import Path

import numpy as np
import pytest

from prompt_tuning_jax.checkpoints import run_folder, train_state
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods import PROMPT


def test_a_best_checkpoint_says_its_frozen_model(tmp_path: Path) -> None:
    arrays = {PROMPT: np.ones((2, 3, 4), np.float32)}
    for folder, extra in (("whole", {"fingerprint": "f" * 16}), ("nameless", {})):
        train_state.save(tmp_path / folder / train_state.BEST, 1, {"trainable": arrays}, extra)
    best, fingerprint = run_folder.read_best_and_model(tmp_path / "whole")
    assert fingerprint == "f" * 16
    np.testing.assert_array_equal(best[PROMPT], arrays[PROMPT])
    with pytest.raises(UserError, match="has not been evaluated"):
        run_folder.read_best(tmp_path / "new")
    (tmp_path / "lost/prompts").mkdir(parents=True)
    with pytest.raises(UserError, match=r"best is gone, .*use the files in .*lost/prompts, or"):
        run_folder.read_best(tmp_path / "lost")
    with pytest.raises(UserError, match=r"nameless.*does not say which frozen model"):
        run_folder.read_best(tmp_path / "nameless")
