"""Deep prompts: one for each layer of the encoder (P-tuning v2, Liu et al. 2022; VPT-deep)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods.base import Context, Method, TunedModel, TuningModule
from prompt_tuning_jax.methods.dense import Dense, small_param
from prompt_tuning_jax.methods.prompt_init import Init, initial_prompt
from prompt_tuning_jax.models.injections import Injections, LayerPrompt
from prompt_tuning_jax.models.t5.model import T5
from prompt_tuning_jax.typing import Array, HostArray


@dataclass(frozen=True, kw_only=True)
class DeepPrompts(Method):
    """``(P_0 + P_1 + ...) * D`` parameters: P_i vectors for layer i of the encoder.

    The first layer's stand before the input, as in prompt tuning.  Those of a later layer take the
    first positions of what it reads: in place of what the layers below made there (``replace``), or
    added to it (``add``, from zeros).  Positions behind them go on as they are, so that no layer
    has more than the first; one with 0 has none of its own.  ``lengths`` has an entry per layer, or
    is empty: ``length`` for all of the L layers.

    With ``hidden`` M above 0 all are made in training by one MLP of P_0 vectors, which is folded
    away in what is kept: ``P_0*D + (D + 1)*M + (M + 1)*L*D`` parameters.
    """

    length: int = 20
    lengths: tuple[int, ...] = ()
    mode: Literal["replace", "add"] = "replace"
    hidden: int = 0
    init: Init = "sampled_vocabulary"
    init_text: str = ""
    init_path: str = ""
    init_population: int = 5000

    def attach(self, model: T5, *, key: Array, context: Context) -> TunedModel:
        lengths = self._lengths(model)
        if self.hidden:
            return TunedModel(model, LayerPrompts(self, MlpVectors(self, model, key=key), lengths))
        drawn = []
        for i, (length, own_key) in enumerate(
            zip(lengths, jax.random.split(key, len(lengths)), strict=True)
        ):
            if not length or (i and self.mode == "add"):
                drawn.append(jnp.zeros((length, model.config.embed_dim), jnp.float32))
                continue
            drawn.append(
                initial_prompt(
                    self.init,
                    key=own_key,
                    embedding_VD=model.token_embedder.table(),
                    length=length,
                    vocabulary=context.vocabulary,
                    labels=context.labels,
                    text=self.init_text,
                    path=self.init_path,
                    population=self.init_population,
                )
            )
        return TunedModel(model, LayerPrompts(self, PlainVectors(jnp.concatenate(drawn)), lengths))

    def for_inference(self, attached: TunedModel) -> tuple[Method, TunedModel]:
        prompts = attached.method
        assert isinstance(prompts, LayerPrompts)
        kept = replace(self, hidden=0, init="uniform")
        plain = PlainVectors(jnp.concatenate(prompts.layers()))
        return kept, TunedModel(attached.model, LayerPrompts(kept, plain, prompts.lengths))

    def prompt_positions(self) -> int:
        return self.lengths[0] if self.lengths else self.length

    def config_errors(self) -> Iterator[str]:
        if self.lengths and not 0 < max(self.lengths) == self.lengths[0]:
            yield (
                f"method.lengths is {','.join(map(str, self.lengths))}; the first is at least 1, "
                "and no layer has more than it"
            )
        if self.lengths and min(self.lengths) < 0:
            yield f"method.lengths has {min(self.lengths)}; must be at least 0"
        if self.hidden < 0:
            yield f"method.hidden is {self.hidden}; must be at least 0"

    def _lengths(self, model: T5) -> tuple[int, ...]:
        layers = model.config.num_encoder_layers
        if self.lengths and len(self.lengths) != layers:
            raise UserError(
                f"method.lengths has {len(self.lengths)} entries and the encoder {layers} layers; "
                "give one for each, or none"
            )
        return self.lengths or (self.length,) * layers


class PlainVectors(nnx.Module):
    """The vectors of all layers themselves, one layer's behind the other's."""

    def __init__(self, prompts_PD: Array):
        self.prompts_PD = small_param(prompts_PD, "prompt", "prompt_embed")

    def layers(self, lengths: tuple[int, ...]) -> list[Array]:
        prompts_PD: Array = self.prompts_PD.get_value()
        return jnp.split(prompts_PD, list(accumulate(lengths))[:-1])


class MlpVectors(nnx.Module):
    """Makes them of one vector per position."""

    def __init__(self, config: DeepPrompts, model: T5, *, key: Array):
        keys = jax.random.split(key, 3)
        width, layers = model.config.embed_dim, model.config.num_encoder_layers
        self.embedding_PD = small_param(
            jax.random.normal(keys[0], (config.prompt_positions(), width))
        )
        self.inner = Dense(width, config.hidden, key=keys[1])
        self.outer = Dense(config.hidden, layers * width, key=keys[2])

    def layers(self, lengths: tuple[int, ...]) -> list[Array]:
        embedding_PD = self.embedding_PD.get_value()
        made_PJ = self.outer(jnp.tanh(self.inner(embedding_PD)))
        made_PLD = made_PJ.reshape(len(embedding_PD), len(lengths), -1)
        return [made_PLD[:length, i] for i, length in enumerate(lengths)]


class LayerPrompts(TuningModule):
    """Puts the first layer's prompt before the input, and the others' into their slots."""

    def __init__(
        self, config: DeepPrompts, vectors: PlainVectors | MlpVectors, lengths: tuple[int, ...]
    ):
        self.config = config
        self.vectors = vectors
        self.lengths = lengths

    def layers(self) -> list[Array]:
        """Each layer's vectors ``[P_i, D]``."""
        return self.vectors.layers(self.lengths)

    def injections(
        self,
        model: T5,
        tokens_BT: Array | HostArray,
        *,
        task_B: Array | HostArray | None = None,
        key: Array | None = None,
    ) -> Injections:
        first_PD, *others = self.layers()
        add = self.config.mode == "add"
        later = [
            LayerPrompt(vectors_BPD=prompt_PD[None], add=add) if len(prompt_PD) else None
            for prompt_PD in others
        ]
        return Injections(
            encoder_input=model.embed(tokens_BT, first_PD), layer_prompts=(None, *later)
        )
