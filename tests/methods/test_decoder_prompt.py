"""Prompts in the decoder of a T5: as part of its input, in training and in decoding."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.checkpoints.prompt_file import PromptMetadata
from prompt_tuning_jax.checkpoints.tuned_checkpoint import TunedCheckpoint
from prompt_tuning_jax.config.methods import PromptTuning
from prompt_tuning_jax.config.overrides import method_to_json
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.api import generate, score
from prompt_tuning_jax.methods import Context, TunedModel, attach_method
from prompt_tuning_jax.models.injections import NO_INJECTIONS
from prompt_tuning_jax.models.t5.model import T5
from tests.micro import ONE_LAYER, Words, make_t5, shifted, token_rows
from tests.tiny_lm import make_lm

SOURCE = token_rows([5, 3, 4], 7)
TARGET = token_rows([4, 6, 2], 6, seed=1)
P, Q = 2, 3
METHOD = PromptTuning(length=P, decoder_length=Q, init="uniform", prompt_to_input=False)


def attached(method: PromptTuning) -> TunedModel:
    model = make_t5(replace(ONE_LAYER, num_decoder_layers=2))
    model.vocabulary = Words()
    return attach_method(model, method, key=jax.random.key(1), context=Context(vocabulary=Words()))


@pytest.mark.parametrize("length", [P, 0])
def test_it_is_the_start_of_the_decoders_input(length: int) -> None:
    """The decoder over prompt, start token and targets at once, without the prompt's outputs."""
    tuned = attached(replace(METHOD, length=length))
    model, method = tuned.model, tuned.method
    assert isinstance(model, T5)

    @jax.jit
    def computed() -> tuple[jax.Array, jax.Array, jax.Array]:
        without = replace(tuned.injections(SOURCE), decoder_prompt=None)
        source = without.model_input
        assert source is not None
        context = model.read(source, injections=without)
        prompt_QD = method.decoder_prompt_PD.get_value()
        embedded_BSD = model.embed_tokens(shifted(TARGET))
        prompt_BQD = jnp.broadcast_to(prompt_QD, (len(SOURCE), *prompt_QD.shape))
        hidden_BSD, _ = model.decoder(
            jnp.concatenate([prompt_BQD, embedded_BSD], axis=1),
            context.keys_values,
            context.mask_BU,
            injections=NO_INJECTIONS,
            key=None,
        )
        bare = model.run(SOURCE, TARGET, injections=without)
        return tuned(SOURCE, TARGET), model.logits(hidden_BSD[:, Q:]), bare

    logits, want, bare = computed()
    np.testing.assert_allclose(logits, want, atol=2e-5)
    assert np.abs(logits - bare).max() > 1e-2


def test_decoding_continues_behind_it() -> None:
    """What greedy and beam search write has the probability that scoring gives it."""
    tuned = attached(METHOD)
    tokens = np.asarray(SOURCE)
    greedy = generate(tuned, tokens, max_length=4)
    np.testing.assert_allclose(greedy.scores, score(tuned, tokens, greedy.ids), atol=1e-4)
    beams = generate(tuned, tokens, strategy="beam", max_length=4, num_beams=2, length_penalty=0.0)
    for rank in range(2):
        scores = score(tuned, tokens, beams.ids[:, rank])
        np.testing.assert_allclose(beams.scores[:, rank], scores, atol=1e-4)


def test_what_has_no_such_prompt() -> None:
    with pytest.raises(UserError, match=r"method\.decoder_length is 3, and only a T5"):
        attach_method(make_lm(), METHOD, key=jax.random.key(0), context=Context())
    assert [*PromptTuning(length=0).config_errors()] == [
        "method.length is 0; must be at least 1, or set method.decoder_length"
    ]
    for length in (0, P):  # the file's prompt is not copied into the decoder
        from_file = replace(METHOD, length=length, init="file", init_path="prompt.npy")
        assert [*from_file.config_errors()] == [
            "method.init=file is a prompt of the encoder alone, and method.decoder_length is 3; "
            "set it to 0, or choose another method.init"
        ]
    assert METHOD.plain_prompt() is None
    stored = TunedCheckpoint(trainable={}, method=method_to_json(METHOD), metadata=PromptMetadata())
    assert '"decoder_length":3' in stored.method.replace(" ", "")
