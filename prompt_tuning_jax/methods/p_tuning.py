"""P-tuning: a prompt encoded by an LSTM or an MLP, anywhere in the input (Liu et al. 2021)."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax.config.methods import PromptTuning, PTuning
from prompt_tuning_jax.methods.base import Context, TunedModel, TuningModule
from prompt_tuning_jax.methods.dense import Dense, small_param, within
from prompt_tuning_jax.methods.prompt import with_prompt
from prompt_tuning_jax.methods.template import Placed, place, put, vectors, without_words
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.models.injections import Injections
from prompt_tuning_jax.models.layers import dropout
from prompt_tuning_jax.typing import Array, HostArray

_GATES = 4


class EncodedPrompt(TuningModule[PTuning]):
    """Encodes the prompt and inserts it into the input together with the anchors."""

    def __init__(
        self,
        config: PTuning,
        prompt_PD: Array,
        encoder: "LstmEncoder | MlpEncoder | None",
        *,
        placed: Placed,
    ):
        super().__init__(config)
        self.placed = placed
        self.prompt_PD = small_param(prompt_PD, "prompt", "prompt_embed")
        if encoder is not None:
            self.encoder = encoder

    @classmethod
    def attach(cls, config: PTuning, model: Model, *, key: Array, context: Context) -> TunedModel:
        template = config.parsed_template()
        placed = place(template, context.vocabulary or model.vocabulary)
        keys = jax.random.split(key)
        width = model.config.embed_dim
        prompt_PD = jax.random.normal(keys[0], (template.prompt_length, width))
        hidden = config.hidden or width
        encoder: LstmEncoder | MlpEncoder | None = None
        if config.encoder == "lstm":
            encoder = LstmEncoder(width, hidden, dropout_rate=config.dropout, key=keys[1])
        elif config.encoder == "mlp":
            encoder = MlpEncoder(width, hidden, key=keys[1])
        return TunedModel(model, cls(config, prompt_PD, encoder, placed=placed))

    def for_inference(self, model: Model) -> TunedModel:
        placed = self.placed
        vectors_AD, length = vectors(placed, self.prompt(), model), len(placed.anchors)
        before, behind = not any(placed.behind), all(n < 0 for n in placed.behind)
        if before or behind:
            config = PromptTuning(length=length, placement="prefix" if before else "before_eos")
            return with_prompt(model, vectors_AD, config.as_trained())
        template = without_words(self.config.parsed_template(), placed)
        kept = replace(self.config.as_trained(), template=template, encoder="none", hidden=0)
        trained = Placed(anchors=(-1,) * length, behind=placed.behind)
        return TunedModel(model, EncodedPrompt(kept, vectors_AD, None, placed=trained))

    def prompt(self, *, key: Array | None = None) -> Array:
        """Returns the trained vectors ``[P, D]`` after the encoder, if there is one."""
        prompt_PD: Array = self.prompt_PD.get_value()
        return prompt_PD if self.config.encoder == "none" else self.encoder(prompt_PD, key=key)

    def injections(
        self,
        model: Model,
        tokens_BT: Array | HostArray,
        *,
        task_B: Array | HostArray | None = None,
        key: Array | None = None,
    ) -> Injections:
        # The fold keeps this key distinct from the model's dropout keys, split from the same key.
        own_key = None if key is None else jax.random.fold_in(key, 0x9707)
        all_AD = vectors(self.placed, self.prompt(key=own_key), model)
        source = model.embed(tokens_BT)
        return Injections(
            model_input=put(all_AD, source, tokens_BT, self.placed.behind, eos_id=model.input_eos)
        )


class MlpEncoder(nnx.Module):
    """Applies three affine maps with relu in between to each vector separately."""

    def __init__(self, width: int, hidden: int, *, key: Array):
        keys = jax.random.split(key, 3)
        self.first = Dense(width, hidden, key=keys[0])
        self.second = Dense(hidden, hidden, key=keys[1])
        self.third = Dense(hidden, width, key=keys[2])

    def __call__(self, prompt_PD: Array, *, key: Array | None = None) -> Array:
        x_PM = jax.nn.relu(self.first(prompt_PD))
        return self.third(jax.nn.relu(self.second(x_PM)))


class LstmEncoder(nnx.Module):
    """Applies two bidirectional LSTM layers, then two affine maps with relu in between."""

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
    """A bidirectional LSTM, ``[P, I] -> [P, 2 * M]``."""

    def __init__(self, inputs: int, hidden: int, *, key: Array):
        keys = jax.random.split(key)
        self.forward = Lstm(inputs, hidden, key=keys[0])
        self.backward = Lstm(inputs, hidden, key=keys[1])

    def __call__(self, x_PI: Array) -> Array:
        return jnp.concatenate([self.forward(x_PI), self.backward(x_PI[::-1])[::-1]], axis=-1)


class Lstm(nnx.Module):
    """An LSTM, ``[P, I] -> [P, M]``, with ``4 * M * (I + M + 2)`` parameters.

    Parameters and their initialization follow torch.nn.LSTM.  The gates are concatenated in the
    order input, forget, cell, output.
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
