"""One description of a ``config.json`` that serves for reading it and for writing it.

A family describes its ``config.json`` once, as a function of ``ConfigFields``: which key holds
which field of ``CausalLMConfig``, and transformers' default for a key that is absent.  With a
``ConfigReader`` that function reads a file, with a ``ConfigWriter`` it writes one, for transformers
4 and 5.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

# Computes a default, or the value of a field without a key, from the fields described before it.
Derived: TypeAlias = Callable[[Mapping[str, Any]], Any]
# Which layers have the sliding window, where the file does not list it: all, those from number
# ``max_window_layers`` on (Qwen), every other one (Gemma 2), or all but every sixth (Gemma 3).
Windows: TypeAlias = Literal["all", "last", "alternating", "five_of_six"]

ACTIVATIONS = {
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


class ConfigFields(ABC):
    """The fields of a ``CausalLMConfig`` and the keys of a ``config.json`` that hold them.

    ``aliases`` are other names of a key that transformers accepts.  A default may depend on the
    fields described before.
    """

    @abstractmethod
    def size(
        self, field: str, key: str, default: int | Derived, aliases: tuple[str, ...] = ()
    ) -> None:
        """A positive integer; ``null`` stands for a default that is derived."""

    @abstractmethod
    def number(self, field: str, key: str, default: float, *, or_none: bool = False) -> None:
        """A positive number; with ``or_none`` it may be ``null``, which is 0 here."""

    @abstractmethod
    def flag(self, field: str, key: str, default: bool) -> None:
        """A field that is true or false."""

    @abstractmethod
    def activation(self, key: str, default: str, *, gated: bool) -> None:
        """The activation of the mlp, by transformers' name."""

    @abstractmethod
    def fixed(self, **fields: Any) -> None:
        """Fields without a key: their values, or how they derive from earlier ones."""

    @abstractmethod
    def only(self, key: str, value: Any, *, otherwise: str) -> None:
        """A key of which one value is supported, transformers' default; ``otherwise`` says why."""

    @abstractmethod
    def same(self, key: str, field: str, *, otherwise: str) -> None:
        """A key that, if it is there, must have a field's value; ``otherwise`` says why."""

    @abstractmethod
    def rope(
        self, *, theta_key: str = "rope_theta", rotary_key: str = "", rotary: float = 1.0
    ) -> None:
        """The base and scaling of rotary positions; ``rotary`` is the default share of a head."""

    @abstractmethod
    def rope_by_layer_type(self, *, theta: float, local_theta: float) -> None:
        """The bases of rotary positions in layers without and with a window (Gemma 3)."""

    @abstractmethod
    def windows(self, which: Windows, *, default: int) -> None:
        """The window of each layer."""

    @abstractmethod
    def query_scale(self, key: str, default: int) -> None:
        """The number whose inverse root is the factor on the scores."""

    @abstractmethod
    def tokens(self, *, pad: int | None, bos: int | None, eos: int | None) -> None:
        """The special token ids."""
