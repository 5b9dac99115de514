"""A PEFT adapter whose config has been read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prompt_tuning_jax.checkpoints.peft.adapter_file import (
    CONFIG,
    in_float32,
    read_tensors,
    shown,
)
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.causal_lm.config import CausalLMConfig
from prompt_tuning_jax.models.config import ModelConfig
from prompt_tuning_jax.param_tree import require_same_names
from prompt_tuning_jax.typing import HostArray


@dataclass(frozen=True, kw_only=True)
class OpenedAdapter:
    """A folder, and the fields of its adapter_config.json."""

    folder: Path
    described: Mapping[str, Any]

    @property
    def where(self) -> Path:
        """The file with the fields, for messages."""
        return self.folder / CONFIG

    def number(self, field: str) -> int:
        """Returns a field that is a positive integer."""
        value = self.described.get(field)
        if type(value) is not int or value < 1:
            raise UserError(
                f"{self.where}: {field} is {shown(value)}; it must be a positive integer"
            )
        return value

    def require(self, field: str, wanted: int, what: str) -> None:
        """Raises UserError if a field has another value, which is ``what``; it may be missing."""
        value = self.described.get(field)
        if value is not None and value != wanted:
            raise UserError(f"{self.where}: {field} is {shown(value)}, but {what} is {wanted}")

    def copies(self, config: ModelConfig) -> int:
        """Returns the number of stacks that it has arrays for; PEFT's default is all of a model."""
        stacks = 1 if isinstance(config, CausalLMConfig) else 2
        copies = self.described.get("num_transformer_submodules")
        if copies not in (None, *range(1, stacks + 1)):
            has = "a T5 has two stacks" if stacks == 2 else "a decoder-only model has one stack"
            raise UserError(f"{self.where}: num_transformer_submodules is {shown(copies)}; {has}")
        return stacks if copies is None else int(copies)

    def tensors(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, HostArray]:
        """Returns the arrays in float32.

        Raises UserError for other names or shapes, or NaN and infinity.
        """
        tensors, file = read_tensors(self.folder)
        require_same_names(tensors, shapes, of=str(file), and_of="an adapter of its kind")
        for name, shape in shapes.items():
            if tensors[name].shape != shape:
                raise UserError(
                    f"{file}: {name} is {list(tensors[name].shape)}, but {CONFIG} and this model "
                    f"require {list(shape)}"
                )
        return {name: in_float32(tensors[name], of=f"{file}: {name}") for name in shapes}
