"""Reads a ``config.json`` by its family's description."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard, get_args

from prompt_tuning_jax.checkpoints.hf.config_fields import (
    ACTIVATIONS,
    ConfigFields,
    Derived,
    Windows,
)
from prompt_tuning_jax.checkpoints.hf.config_files import GENERATION_CONFIG
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.causal_lm.config import (
    CausalLMConfig,
    RopeKind,
    RopeScaling,
    yarn_attention_factor,
)
from prompt_tuning_jax.models.config import TokenIds

_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
_MOST_LAYERS = 4096
_PATTERN = ("sliding_window_pattern", 6)


class ConfigReader(ConfigFields):
    """Reads a ``config.json``; ``values`` are the fields so far.  Raises UserError.

    ``part`` is the object of the file that ``raw`` is, such as ``encoder``; "" is the whole file.
    """

    def __init__(
        self,
        raw: Mapping[str, Any],
        *,
        generation: Mapping[str, Any],
        path: Path,
        part: str = "",
    ):
        self.raw = raw
        self.generation = generation
        self.path = path
        self.part = part
        self.values: dict[str, Any] = {"model_type": raw["model_type"]}

    def config(self) -> CausalLMConfig:
        """Returns the configuration; UserError for sizes that do not go together."""
        config = CausalLMConfig(**self.values)
        if config.num_heads % config.num_kv_heads:
            raise self._error(
                f"{config.num_heads} heads cannot share {config.num_kv_heads} heads of keys and "
                "values"
            )
        if config.positions == "rope" and (config.rotary_dim % 2 or config.head_dim % 2):
            raise self._error(
                f"rotary positions need an even number of values, but a head has {config.head_dim} "
                f"of which {config.rotary_dim or config.head_dim} are rotated"
            )
        return config

    def size(
        self, field: str, key: str, default: int | Derived, aliases: tuple[str, ...] = ()
    ) -> None:
        value = self._get(key, aliases)
        if value is None and (callable(default) or not self._has(key, aliases)):
            value = default(self.values) if callable(default) else default
        most = _MOST_LAYERS if field == "num_layers" else 2**31
        if type(value) is not int or not 0 < value < most:
            raise self._error(f"{key} is {_shown(value)}; it must be a positive integer")
        self.values[field] = value

    def number(self, field: str, key: str, default: float, *, or_none: bool = False) -> None:
        value = self.raw.get(key, default)
        if or_none and value in (None, 0):
            value = 0.0
        elif not _is_number(value) or value <= 0:
            raise self._error(f"{key} is {_shown(value)}; it must be a positive number")
        self.values[field] = float(value)

    def flag(self, field: str, key: str, default: bool) -> None:
        self.values[field] = self._flag(key, default)

    def activation(self, key: str, default: str, *, gated: bool) -> None:
        name = self.raw.get(key, default)
        if not isinstance(name, str) or name not in ACTIVATIONS:
            raise self._error(f"{key} is {_shown(name)}; supported: {', '.join(ACTIVATIONS)}")
        self.values["mlp_activations"] = (ACTIVATIONS[name], *(("linear",) if gated else ()))

    def fixed(self, **fields: Any) -> None:
        for field, value in fields.items():
            self.values[field] = value(self.values) if callable(value) else value

    def only(self, key: str, value: Any, *, otherwise: str) -> None:
        actual = self.raw.get(key, value)
        if (actual or False) != (value or False):  # null is false
            raise self._error(f"{key} is {_shown(actual)}: {otherwise} is not supported")

    def same(self, key: str, field: str, *, otherwise: str) -> None:
        actual = self.raw.get(key)
        if actual is not None and actual != self.values[field]:
            raise self._error(f"{key} is {_shown(actual)}: {otherwise} is not supported")

    def rope(
        self, *, theta_key: str = "rope_theta", rotary_key: str = "", rotary: float = 1.0
    ) -> None:
        # transformers 5 has all in rope_parameters; rope_scaling of version 4 takes precedence.
        entry = self._object("rope_scaling") or self._object("rope_parameters")
        theta = self._theta(entry, self.raw.get(theta_key, 10_000.0), theta_key)
        share: Any = 1.0
        if rotary_key:  # other models rotate all of a head, whatever their files say
            share = entry.get("partial_rotary_factor", self.raw.get(rotary_key, rotary))
        if not _is_number(share) or not 0 < share <= 1:
            raise self._error(f"{rotary_key} is {_shown(share)}; it must be above 0 and at most 1")
        rotary_dim = int(self.values["head_dim"] * share)
        self.fixed(
            positions="rope",
            rope_theta=theta,
            rotary_dim=0 if rotary_dim == self.values["head_dim"] else rotary_dim,
            rope_scaling=self._scaling(entry),
        )

    def rope_by_layer_type(self, *, theta: float, local_theta: float) -> None:
        types = self._object("rope_parameters")
        whole, local = types.get(_GLOBAL) or {}, types.get(_LOCAL) or {}
        if not isinstance(whole, dict) or not isinstance(local, dict):
            raise self._error("rope_parameters is not an object per kind of layer")
        if types and not (whole or local):
            raise self._error(f"rope_parameters has neither {_GLOBAL} nor {_LOCAL}")
        if self._scaling(local) is not None:
            raise self._error(f"a rope_type in {_LOCAL} is not supported")
        local_default = self.raw.get("rope_local_base_freq", local_theta)
        self.fixed(
            positions="rope",
            rope_theta=self._theta(whole, self.raw.get("rope_theta", theta), "rope_theta"),
            rope_local_theta=self._theta(local, local_default, "rope_local_base_freq"),
            rope_scaling=self._scaling({**whole, **self._object("rope_scaling")}),
        )

    def windows(self, which: Windows, *, default: int) -> None:
        number = self.values["num_layers"]
        window = self.raw.get("sliding_window", default)
        if which == "last" and not self._flag("use_sliding_window", False):
            window = None
        if window is not None and (type(window) is not int or not 0 < window < 2**31):
            raise self._error(f"sliding_window is {_shown(window)}; it must be a positive integer")
        types = self.raw.get("layer_types")
        if types is None:
            types = [_LOCAL if self._is_local(which, i) else _GLOBAL for i in range(number)]
        if not isinstance(types, list) or len(types) != number:
            raise self._error(f"layer_types is {_shown(types)}; it must have {number} entries")
        other = next((kind for kind in types if kind not in (_LOCAL, _GLOBAL)), None)
        if other is not None:
            raise self._error(f"layer_types has {_shown(other)}; supported: {_LOCAL}, {_GLOBAL}")
        windows = tuple((window or 0) if kind == _LOCAL else 0 for kind in types)
        self.values["windows"] = windows if any(windows) else ()

    def query_scale(self, key: str, default: int) -> None:
        value = self.raw.get(key, default)
        if not _is_number(value) or value <= 0:
            raise self._error(f"{key} is {_shown(value)}; it must be a positive number")
        self.values["query_scale"] = float(value) ** -0.5

    def tokens(self, *, pad: int | None, bos: int | None, eos: int | None) -> None:
        # generation_config.json takes precedence, as in transformers' generate.
        here = self.ids("eos_token_id", eos, of=self.raw)
        beside = self.path.with_name(GENERATION_CONFIG)
        ends = self.ids("eos_token_id", None, of=self.generation, file=beside) or here
        if not ends:
            raise self._error("there is no eos_token_id: add the id that ends a text")
        first = here[0] if here and here[0] in ends else ends[0]
        pads = self.ids("pad_token_id", None, of=self.generation, file=beside)
        pads = pads or self.ids("pad_token_id", pad, of=self.raw)
        begins = self.ids("bos_token_id", bos, of=self.raw)
        self.values["bos"] = begins[0] if begins else -1
        self.values["token_ids"] = TokenIds(
            # Sequences without a padding token are filled with the end.
            pad=pads[0] if pads else first,
            eos=first,
            start=-1,
            more_eos=tuple(dict.fromkeys(i for i in ends if i != first)),
        )

    def _is_local(self, which: Windows, layer: int) -> bool:
        if which == "all":
            return True
        if which == "alternating":
            return layer % 2 == 0
        key, default = ("max_window_layers", 28) if which == "last" else _PATTERN
        number = self.raw.get(key, default)
        if type(number) is not int or not 0 <= number < 2**31:
            raise self._error(f"{key} is {_shown(number)}; it must be an integer")
        return layer >= number if which == "last" else number > 0 and (layer + 1) % number != 0

    def _scaling(self, entry: Mapping[str, Any]) -> RopeScaling | None:
        kind = entry.get("rope_type", entry.get("type", "default"))
        if kind == "default":
            return None
        if kind not in get_args(RopeKind):
            known = ", ".join(("default", *get_args(RopeKind)))
            raise self._error(f"rope_type is {_shown(kind)}; supported: {known}")
        if kind == "linear":
            return RopeScaling(kind=kind, factor=self._positive(entry, "factor"))
        longest = entry.get("original_max_position_embeddings", self.values["max_positions"])
        if type(longest) is not int or not 0 < longest < 2**31:
            raise self._error(
                f"original_max_position_embeddings is {_shown(longest)}; it must be a positive "
                "integer"
            )
        # With null as its factor, YaRN stretches the original length to the model's window.
        stretched = "factor" in entry and kind == "yarn"
        implied = self.values["max_positions"] / longest if stretched else None
        factor = self._positive(entry, "factor", implied)
        scaling = RopeScaling(kind=kind, factor=factor, original_max_positions=longest)
        if kind == "llama3":
            return dataclasses.replace(
                scaling,
                low_freq_factor=self._positive(entry, "low_freq_factor"),
                high_freq_factor=self._positive(entry, "high_freq_factor"),
            )
        truncate = entry.get("truncate", True)
        if type(truncate) is not bool:
            raise self._error(f"truncate of the rope is {_shown(truncate)}; it must be a boolean")
        return dataclasses.replace(
            scaling,
            beta_fast=self._positive(entry, "beta_fast", 32.0),
            beta_slow=self._positive(entry, "beta_slow", 1.0),
            attention_factor=self._attention_factor(entry, factor),
            truncate=truncate,
        )

    def _attention_factor(self, entry: Mapping[str, Any], factor: float) -> float:
        """Returns the factor of YaRN's cosines and sines.

        The file names it, or its scales imply it.
        """
        implied = yarn_attention_factor(factor)
        scales = ("mscale", "mscale_all_dim")
        if all(entry.get(key) for key in scales):
            above, below = (self._positive(entry, key) for key in scales)
            implied = yarn_attention_factor(factor, above) / yarn_attention_factor(factor, below)
        return self._positive(entry, "attention_factor", implied)

    def _positive(self, entry: Mapping[str, Any], key: str, default: float | None = None) -> float:
        value = default if entry.get(key) is None else entry[key]
        if not _is_number(value) or not value > 0:
            raise self._error(f"{key} of the rope is {_shown(value)}; it must be positive")
        return float(value)

    def _theta(self, entry: Mapping[str, Any], default: Any, key: str) -> float:
        theta = entry.get("rope_theta", default)
        if not _is_number(theta) or theta <= 1:
            raise self._error(f"{key} is {_shown(theta)}; it must be a number above 1")
        return float(theta)

    def ids(
        self, key: str, default: int | None, *, of: Mapping[str, Any], file: Path | None = None
    ) -> list[int]:
        """Returns the ids under a key, none for a default outside the vocabulary, and for -1.

        ``file`` is that of ``of``, if it is not the configuration.
        """
        most = self.values["vocab_size"]
        if key not in of:
            return [] if default is None or default >= most else [default]
        value = of[key]
        listed = value if isinstance(value, list) else [] if value in (None, -1) else [value]
        for each in listed:
            if type(each) is not int or not 0 <= each < most:
                message = f"{key} is {_shown(value)}; it must be an id from 0 to {most - 1}"
                raise self._error(message) if file is None else UserError(f"{file}: {message}")
        return listed

    def _get(self, key: str, aliases: tuple[str, ...]) -> Any:
        return next((self.raw[k] for k in (key, *aliases) if self.raw.get(k) is not None), None)

    def _has(self, key: str, aliases: tuple[str, ...]) -> bool:
        return any(k in self.raw for k in (key, *aliases))

    def _flag(self, key: str, default: bool) -> bool:
        value = self.raw.get(key, default)
        if not isinstance(value, bool):
            raise self._error(f"{key} is {_shown(value)} and must be true or false")
        return value

    def _object(self, key: str) -> dict[str, Any]:
        value = self.raw.get(key)
        if value is not None and not isinstance(value, dict):
            raise self._error(f"{key} is {_shown(value)} and not an object")
        return value or {}

    def _error(self, message: str) -> UserError:
        where = f"{self.path}, {self.part}" if self.part else str(self.path)
        return UserError(f"{where}: {message}")


def _is_number(value: Any) -> TypeGuard[int | float]:
    return type(value) in (int, float) and math.isfinite(value)


def _shown(value: Any) -> str:
    return repr(value)[:80]
