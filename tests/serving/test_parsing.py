"""Requests become token ids as in training, for any vocabulary."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from prompt_tuning_jax.checkpoints.prompt_file import PromptMetadata
from prompt_tuning_jax.data.tasks.wording import Wording
from prompt_tuning_jax.data.vocabularies.hf_tokenizer import HfTokenizer
from prompt_tuning_jax.data.vocabularies.vocab import AnyVocabulary, ByteVocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.causal_lm.config import CausalLMConfig
from prompt_tuning_jax.serving.request_parser import RequestParser
from prompt_tuning_jax.serving.schema import Limits, PredictRequest, RefusedError
from prompt_tuning_jax.serving.tasks import ServedPrompt, ServedTask, Tasks
from tests.data.tokenizer_cases import CHAT, byte_level
from tests.tiny_lm import make_lm

PROMPT = ServedPrompt(
    name="seed_0", prompt_PD=np.zeros((3, 4), np.float32), metadata=PromptMetadata()
)


def parse(
    words: AnyVocabulary, task: str, text: str, *, config: Any = None, **options: Any
) -> tuple[list[int], bool]:
    shapes = SimpleNamespace(modes=("generate",), longest=30, longest_target=8, max_new_tokens=8)
    config = config or SimpleNamespace(reads_images=False)
    engine: Any = SimpleNamespace(
        vocabulary=words, shapes=shapes, config=config, causal=isinstance(config, CausalLMConfig)
    )
    tasks = {
        "plain": ServedTask(name="plain", prompts=(PROMPT,)),
        "chat": ServedTask(name="chat", prompts=(PROMPT,), wording=Wording(chat=True)),
    }
    validator: Any = SimpleNamespace(label_ids_of=list)
    parser = RequestParser(engine, Tasks(tasks), validator=validator, limits=Limits())
    request = PredictRequest.model_validate(
        {"task": task, "inputs": [text], "mode": "generate", "options": options}
    )
    (one,) = parser.parse(request)
    return list(one.ids), one.truncated


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> HfTokenizer:
    config = {"eos_token": "<|im_end|>", "chat_template": CHAT}
    return HfTokenizer(byte_level(tmp_path_factory.mktemp("words"), config=config))


def test_inputs_are_encoded_as_in_training(words: HfTokenizer) -> None:
    assert parse(words, "plain", "yes") == (words.encode("yes"), False)
    assert parse(ByteVocabulary(), "plain", "yes") == ([*ByteVocabulary().encode("yes"), 1], False)
    message = words.encode_input("yes <|im_end|>", chat=True)
    assert parse(words, "chat", "yes <|im_end|>") == (message, False)
    assert parse(words, "chat", "yes", raw=True) == (words.encode("yes"), False)


def test_the_end_of_an_input_survives_truncation(words: HfTokenizer) -> None:
    long = "yes no " * 20
    for vocabulary, task in ((words, "plain"), (words, "chat"), (ByteVocabulary(), "plain")):
        whole = vocabulary.encode_input(long, chat=task == "chat")
        with pytest.raises(RefusedError, match="this server reads at most 30"):
            parse(vocabulary, task, long)
        cut, truncated = parse(vocabulary, task, long, truncate=True)
        kept = vocabulary.num_kept_at_end(chat=task == "chat")
        assert truncated and len(cut) == 30
        assert cut == [*whole[: 30 - kept], *whole[len(whole) - kept :]]


def test_a_text_that_the_vocabulary_refuses_is_the_clients_error(words: HfTokenizer) -> None:
    """Such as one with the token that stands for an image."""

    class Refusing(HfTokenizer):
        def encode_inputs(self, *texts: object, **options: object) -> list[list[int]]:
            raise UserError("an input has <image>")

    with pytest.raises(RefusedError, match="an input has <image>") as caught:
        parse(Refusing(words.path), "plain", "<image>")
    assert (caught.value.status, caught.value.field) == (422, "inputs[0]")


def test_columns_may_hold_any_number_of_json() -> None:
    request = {"task": "plain", "inputs": [{"a": 1.5, "b": 2, "c": True, "d": None}]}
    assert PredictRequest.model_validate(request).inputs[0] == request["inputs"][0]
    with pytest.raises(ValidationError):
        PredictRequest.model_validate({"task": "plain", "inputs": [{"a": float("nan")}]})


def test_an_empty_input_needs_a_prompt(words: HfTokenizer) -> None:
    assert parse(words, "plain", "") == ([], False)
    with pytest.raises(RefusedError, match="the input is empty, and this model needs a token"):
        parse(words, "", "")
    assert parse(ByteVocabulary(), "", "") == ([1], False)
    # A decoder-only model's server holds keys and values of prompts, and no hidden states.
    with pytest.raises(RefusedError, match="the input is empty, and this model needs a token"):
        parse(words, "plain", "", config=make_lm().config)
