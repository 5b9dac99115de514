"""What the commands of many runs train and evaluate."""

from collections.abc import Callable
from typing import Any

import pytest

from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.studies import runs


def watched_runs(
    monkeypatch: pytest.MonkeyPatch, describe: Callable[[str, Experiment], str]
) -> list[str]:
    """A list that grows by ``describe("train" or "evaluate", experiment)`` with each, in order."""
    calls: list[str] = []
    for name in ("train", "evaluate"):
        real = getattr(runs, name)

        def watched(
            of: Experiment, *args: Any, _real: Any = real, _name: str = name, **kw: Any
        ) -> Any:
            calls.append(describe(_name, of))
            return _real(of, *args, **kw)

        monkeypatch.setattr(runs, name, watched)
    return calls
