"""P-tuning: a prompt made by an LSTM or an MLP, anywhere in the input (Liu et al. 2021)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods.base import Context, Method, TunedModel, TuningModule
from prompt_tuning_jax.methods.dense import Dense, small_param, within
from prompt_tuning_jax.methods.prompt import PromptTuning
from prompt_tuning_jax.methods.prompt_combine import Placement
from prompt_tuning_jax.methods.template import (
    Placed,
    Template,
    parse_template,
    place,
    put,
    vectors,
)
from prompt_tuning_jax.models.injections import Injections
from prompt_tuning_jax.models.layers import dropout
from prompt_tuning_jax.models.t5.model import T5
from prompt_tuning_jax.typing import Array, HostArray

_GATES = 4


@dataclass(frozen=True, kw_only=True)
class PTuning(Method):
    """A prompt of P vectors of the model's width D, made in training by an encoder as PEFT has it.

    ``template`` says where prompt, anchors and input stand (``methods/template.py``); P is the
    number of its trained vectors, ``length`` for each ``{prompt}``.  With ``hidden`` M (0: D) the
    parameters are

    - ``mlp``: ``P*D + (D + 1)*M + (M + 1)*M + (M + 1)*D``,
    - ``lstm``, two layers in both directions and an MLP: ``P*D + 10*M*D + 36*M**2 + 34*M + D``,
    - ``none``: ``P*D``, the prompt itself.  This is what is kept of the others, anchors then being
      part of it; where all stands before the input, or all behind it, it is ``PromptTuning``.

    ``dropout`` is that between the LSTM's layers.  Source: peft 0.21, tuners/p_tuning/model.py.
    """

    default_optimizer: ClassVar[Mapping[str, Any]] = {"learning_rate": 0.003}

    length: int = 20
    template: str = "{prompt} {input}"
    encoder: Literal["lstm", "mlp", "none"] = "lstm"
    hidden: int = 0
    dropout: float = 0.0

    def attach(self, model: T5, *, key: Array, context: Context) -> TunedModel:
        template = self._template()
        placed = place(template, context.vocabulary or model.vocabulary)
        keys = jax.random.split(key)
        shape = (template.prompt_length, model.config.embed_dim)
        drawn_PD = jax.random.normal(keys[0], shape)
        hidden = self.hidden or model.config.embed_dim
        encoder: LstmEncoder | MlpEncoder | None = None
        if self.encoder == "lstm":
            encoder = LstmEncoder(shape[1], hidden, dropout_rate=self.dropout, key=keys[1])
        elif self.encoder == "mlp":
            encoder = MlpEncoder(shape[1], hidden, key=keys[1])
        return TunedModel(model, EncodedPrompt(self, drawn_PD, encoder, placed=placed))

    def for_inference(self, attached: TunedModel) -> tuple[Method, TunedModel]:
        prompt = attached.method
        assert isinstance(prompt, EncodedPrompt)
        placed = prompt.placed
        all_AD = vectors(placed, prompt.prompt(), attached.model)
        model, length = attached.model, len(placed.anchors)
        if not any(placed.behind) or all(n < 0 for n in placed.behind):
            at_start = not any(placed.behind)
            place_at: Placement = "prefix" if at_start else "before_eos"
            plain = PromptTuning(length=length, init="uniform", placement=place_at)
            return plain, plain.with_prompt(model, all_AD)
        template = self._template().without_words(placed)
        kept = replace(self, template=template, encoder="none", hidden=0, dropout=0.0)
        bare = Placed(anchors=(-1,) * length, behind=placed.behind)
        return kept, TunedModel(model, EncodedPrompt(kept, all_AD, None, placed=bare))

    def prompt_positions(self) -> int:
        """Without its anchors, whose number the vocabulary decides."""
        return self._template().prompt_length

    def uses_rng(self) -> bool:
        return self.dropout > 0

    def config_errors(self) -> Iterator[str]:
        if self.hidden < 0:
            yield f"method.hidden is {self.hidden}; must be at least 0"
        if not 0 <= self.dropout < 1:
            yield f"method.dropout is {self.dropout}; must be at least 0 and below 1"
        if self.dropout and self.encoder != "lstm":
            yield (
                f"method.dropout is {self.dropout}; it is that between the layers of "
                f"method.encoder=lstm, and method.encoder is {self.encoder}"
            )
        self._template()

    def _template(self) -> Template:
        template = parse_template(self.template, length=self.length)
        if not template.prompt_length:
            raise UserError(f"method.template: {self.template!r} has no {{prompt}}; add one")
        return template


class EncodedPrompt(TuningModule):
    """Makes the prompt and puts it, and the anchors, into the input."""

    def __init__(
        self,
        config: PTuning,
        prompt_PD: Array,
        encoder: "LstmEncoder | MlpEncoder | None",
        *,
        placed: Placed,
    ):
        self.config = config
        self.placed = placed
        self.prompt_PD = small_param(prompt_PD, "prompt", "prompt_embed")
        if encoder is not None:
            self.encoder = encoder

    def prompt(self, *, key: Array | None = None) -> Array:
        """The trained vectors ``[P, D]`` as the model gets them."""
        prompt_PD: Array = self.prompt_PD.get_value()
        return prompt_PD if self.config.encoder == "none" else self.encoder(prompt_PD, key=key)

    def injections(
        self,
        model: T5,
        tokens_BT: Array | HostArray,
        *,
        task_B: Array | HostArray | None = None,
        key: Array | None = None,
    ) -> Injections:
        all_AD = vectors(self.placed, self.prompt(key=key), model)
        source = model.embed(tokens_BT)
        return Injections(
            encoder_input=put(all_AD, source, tokens_BT, self.placed.behind, eos_id=model.input_eos)
        )


class MlpEncoder(nnx.Module):
    """Three affine maps with relu between them, of each vector by itself."""

    def __init__(self, width: int, hidden: int, *, key: Array):
        keys = jax.random.split(key, 3)
        self.first = Dense(width, hidden, key=keys[0])
        self.second = Dense(hidden, hidden, key=keys[1])
        self.third = Dense(hidden, width, key=keys[2])

    def __call__(self, prompt_PD: Array, *, key: Array | None = None) -> Array:
        x_PM = jax.nn.relu(self.first(prompt_PD))
        return self.third(jax.nn.relu(self.second(x_PM)))


class LstmEncoder(nnx.Module):
    """Two bidirectional LSTM layers along the prompt, then two affine maps with relu between."""

    def __init__(self, width: int, hidden: int, *, dropout_rate: float, key: Array):
        keys = jax.random.split(key, 4)
        self.lower = BothWays(width, hidden, key=keys[0])
        self.upper = BothWays(2 * hidden, hidden, key=keys[1])
        self.inner = Dense(2 * hidden, 2 * hidden, key=keys[2])
        self.outer = Dense(2 * hidden, width, key=keys[3])
        self.dropout_rate = dropout_rate

    def __call__(self, prompt_PD: Array, *, key: Array | None = None) -> Array:
        x_PM = dropout(self.lower(prompt_PD), self.dropout_rate, key=key)
        return self.outer(jax.nn.relu(self.inner(self.upper(x_PM))))


class BothWays(nnx.Module):
    """``[P, I] -> [P, 2 * M]``: an LSTM from the left beside one from the right."""

    def __init__(self, inputs: int, hidden: int, *, key: Array):
        keys = jax.random.split(key)
        self.forward = Lstm(inputs, hidden, key=keys[0])
        self.backward = Lstm(inputs, hidden, key=keys[1])

    def __call__(self, x_PI: Array) -> Array:
        return jnp.concatenate([self.forward(x_PI), self.backward(x_PI[::-1])[::-1]], axis=-1)


class Lstm(nnx.Module):
    """``[P, I] -> [P, M]``; ``4*M*(I + M + 2)`` parameters, as torch.nn.LSTM has and starts them.

    The gates are input, forget, cell and output, side by side.
    """

    def __init__(self, inputs: int, hidden: int, *, key: Array):
        shapes = ((inputs, _GATES * hidden), (hidden, _GATES * hidden))
        keys = jax.random.split(key, 4)
        bound = hidden**-0.5
        self.input_IG, self.hidden_MG = (
            small_param(within(own, shape, bound))
            for own, shape in zip(keys[:2], shapes, strict=True)
        )
        self.input_bias_G, self.hidden_bias_G = (
            small_param(within(own, shapes[0][1:], bound)) for own in keys[2:]
        )

    def __call__(self, x_PI: Array) -> Array:
        bias_G = self.input_bias_G.get_value() + self.hidden_bias_G.get_value()
        from_input_PG = x_PI @ self.input_IG.get_value() + bias_G
        hidden_MG = self.hidden_MG.get_value()

        def step(state: tuple[Array, Array], gates_G: Array) -> tuple[tuple[Array, Array], Array]:
            h_M, c_M = state
            i_M, f_M, g_M, o_M = jnp.split(gates_G + h_M @ hidden_MG, _GATES)
            c_M = jax.nn.sigmoid(f_M) * c_M + jax.nn.sigmoid(i_M) * jnp.tanh(g_M)
            h_M = jax.nn.sigmoid(o_M) * jnp.tanh(c_M)
            return (h_M, c_M), h_M

        zeros_M = jnp.zeros(hidden_MG.shape[0], jnp.float32)
        return jax.lax.scan(step, (zeros_M, zeros_M), from_input_PG)[1]
