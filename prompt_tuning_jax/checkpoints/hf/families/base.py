"""What a family consists of, and derivations that several share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prompt_tuning_jax.checkpoints.hf.config_fields import ConfigFields
from prompt_tuning_jax.checkpoints.hf.names import NameTable


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family.

    Attributes:
      architecture: transformers' class.
      describe: what its ``config.json`` says.
      names: of its tensors.
      text_type: the ``model_type`` of the language model that ``text_config`` describes, in a model
        that reads images, too; only this part is used, and written as that type.  The first of
        ``names.prefixes`` is that of transformers 5.
    """

    architecture: str
    describe: Callable[[ConfigFields], None]
    names: NameTable
    text_type: str = ""


def head_width(fields: Mapping[str, Any]) -> int:
    """Returns the width of a head where the heads together are as wide as the model."""
    width: int = max(1, fields["embed_dim"] // fields["num_heads"])
    return width


def all_heads(fields: Mapping[str, Any]) -> int:
    """Returns as many heads of keys and values as heads."""
    heads: int = fields["num_heads"]
    return heads


def root_of_width(fields: Mapping[str, Any]) -> float:
    """Returns the usual factor on the scores."""
    factor: float = fields["head_dim"] ** -0.5
    return factor
