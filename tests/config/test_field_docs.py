"""Each field of an experiment has a documentation, which ``--help`` and docs/ show."""

from dataclasses import dataclass, fields

import pytest

from prompt_tuning_jax.config.base import Config, field_docs, field_types
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.config.methods import METHODS, MethodConfig

GROUPS = {
    **{name: kind for name, kind in field_types(Experiment).items() if kind is not MethodConfig},
    **METHODS,
}


@pytest.mark.parametrize("group", GROUPS)
def test_every_field_is_documented(group: str) -> None:
    docs = field_docs(GROUPS[group])
    assert [*docs] == [field.name for field in fields(GROUPS[group])]
    assert [name for name, text in docs.items() if not text] == []


def test_comments_above_and_beside() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Base(Config):
        # Of two lines.
        # Ending here.
        above: int = 1
        beside: str = "a # b"  # beside # it

    @dataclass(frozen=True, kw_only=True)
    class Derived(Base):
        none: bool = False

        # Not about a field.

        # Above,
        both: tuple[int, ...] = ()  # and beside.

    assert field_docs(Derived) == {
        "above": "Of two lines. Ending here.",
        "beside": "Beside # it",
        "none": "",
        "both": "Above, and beside",
    }
