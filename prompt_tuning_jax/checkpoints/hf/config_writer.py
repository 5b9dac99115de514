"""Writes a ``config.json`` from the description that also reads it."""

from typing import Any

from prompt_tuning_jax.checkpoints.hf.config_fields import (
    ACTIVATIONS,
    ConfigFields,
    Derived,
    Windows,
)
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.causal_lm.config import CausalLMConfig


class ConfigWriter(ConfigFields):
    """Collects the keys of a ``config.json`` in ``raw``, for transformers 4 and 5."""

    def __init__(self, config: CausalLMConfig):
        self.config = config
        self.raw: dict[str, Any] = {"model_type": config.model_type}

    def size(
        self, field: str, key: str, default: int | Derived, aliases: tuple[str, ...] = ()
    ) -> None:
        self.raw[key] = getattr(self.config, field)

    def number(self, field: str, key: str, default: float, *, or_none: bool = False) -> None:
        value = getattr(self.config, field)
        self.raw[key] = None if or_none and not value else value

    def flag(self, field: str, key: str, default: bool) -> None:
        self.raw[key] = getattr(self.config, field)

    def activation(self, key: str, default: str, *, gated: bool) -> None:
        first = self.config.mlp_activations[0]
        # The family's usual name, or the first one of the same function.
        names = [default, *ACTIVATIONS]
        name = next((name for name in names if ACTIVATIONS[name] == first), None)
        if name is None:
            raise UserError(f"transformers has no name for the activation {first}")
        self.raw[key] = name

    def fixed(self, **fields: Any) -> None:
        values = vars(self.config)
        for field, value in fields.items():
            wanted = value(values) if callable(value) else value
            if values[field] != wanted:
                raise UserError(
                    f"a model of type {self.config.model_type} has {field} = {wanted!r}, and this "
                    f"one has {values[field]!r}: transformers cannot load it as one"
                )

    def only(self, key: str, value: Any, *, otherwise: str) -> None:
        self.raw[key] = value

    def same(self, key: str, field: str, *, otherwise: str) -> None:
        self.raw[key] = getattr(self.config, field)

    def rope(
        self, *, theta_key: str = "rope_theta", rotary_key: str = "", rotary: float = 1.0
    ) -> None:
        config = self.config
        scaling = self._scaling()
        share: dict[str, Any] = {}
        if rotary_key:
            factor = config.rotary_dim / config.head_dim if config.rotary_dim else 1.0
            self.raw[rotary_key] = factor
            share = {"partial_rotary_factor": factor}
        self.raw[theta_key] = config.rope_theta
        self.raw["rope_scaling"] = scaling or None
        kind = scaling or {"rope_type": "default"}
        self.raw["rope_parameters"] = {"rope_theta": config.rope_theta, **share, **kind}

    def rope_by_layer_type(self, *, theta: float, local_theta: float) -> None:
        config = self.config
        scaling = self._scaling()
        local = config.rope_theta if config.rope_local_theta is None else config.rope_local_theta
        self.raw["rope_theta"] = config.rope_theta
        self.raw["rope_local_base_freq"] = local
        self.raw["rope_scaling"] = scaling or None
        self.raw["rope_parameters"] = {
            "full_attention": {
                "rope_theta": config.rope_theta,
                **(scaling or {"rope_type": "default"}),
            },
            "sliding_attention": {"rope_theta": local, "rope_type": "default"},
        }

    def windows(self, which: Windows, *, default: int) -> None:
        number = self.config.num_layers
        windows = self.config.windows or (0,) * number
        sizes = sorted({window for window in windows if window})
        if len(sizes) > 1 or (which == "all" and sizes and not all(windows)):
            raise UserError(
                f"a model of type {self.config.model_type} has one window"
                f"{' in all layers' if which == 'all' else ''}; this one has {list(windows)}"
            )
        # Without a window, transformers' Gemma still computes with this number.
        none = None if which in ("all", "last") else default
        self.raw["sliding_window"] = sizes[0] if sizes else none
        if which == "all":
            return
        self.raw["layer_types"] = [
            "sliding_attention" if window else "full_attention" for window in windows
        ]
        if which == "last":
            self.raw["use_sliding_window"] = bool(sizes)
            # The first layers have none; version 4 knew no list of layers at first.
            self.raw["max_window_layers"] = next((i for i, w in enumerate(windows) if w), number)

    def query_scale(self, key: str, default: int) -> None:
        exact = self.config.query_scale**-2
        rounded = round(exact)
        same = rounded > 0 and float(rounded) ** -0.5 == self.config.query_scale
        self.raw[key] = rounded if same else exact

    def tokens(self, *, pad: int | None, bos: int | None, eos: int | None) -> None:
        ids = self.config.token_ids
        self.raw["bos_token_id"] = None if self.config.bos < 0 else self.config.bos
        self.raw["eos_token_id"] = ids.eos
        self.raw["pad_token_id"] = ids.pad

    def _scaling(self) -> dict[str, Any]:
        scaling = self.config.rope_scaling
        if scaling is None:
            return {}
        described: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            described |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_positions,
            }
        if scaling.kind == "yarn":
            described |= {
                "original_max_position_embeddings": scaling.original_max_positions,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "attention_factor": scaling.attention_factor,
                "truncate": scaling.truncate,
            }
        return described
