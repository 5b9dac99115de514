"""Chat templates: what surrounds a message, and that no message can contain special tokens."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prompt_tuning_jax.data.batching.tokenize import tokenize
from prompt_tuning_jax.data.tasks.task import Source, Task
from prompt_tuning_jax.data.vocabularies import chat_template
from prompt_tuning_jax.data.vocabularies.chat_template import ChatFormat, render_chat
from prompt_tuning_jax.data.vocabularies.hf_tokenizer import HfTokenizer
from prompt_tuning_jax.data.vocabularies.vocab import ByteVocabulary, load_vocabulary
from prompt_tuning_jax.errors import UserError
from tests.data.tokenizer_cases import (
    CHAT,
    CORPUS,
    SPECIAL,
    byte_level,
    llama_metadata,
    sentencepiece_model,
    write_gguf,
)

pytest.importorskip("jinja2", reason="jinja2 is not installed")


def render(template: str, **special: str) -> ChatFormat:
    return render_chat(template, tuple(special.items()), of="model")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> HfTokenizer:
    config = {"eos_token": "<|im_end|>", "chat_template": CHAT}
    return HfTokenizer(byte_level(tmp_path_factory.mktemp("chat"), config=config))


def test_what_templates_put_around_a_message() -> None:
    assert render(CHAT) == ChatFormat(
        before="<|im_start|>user\n", after="<|im_end|>\n<|im_start|>assistant\n"
    )
    # Gemma's, in short: it trims, and names the beginning of sequence.
    gemma = (
        "{{ bos_token }}{%- for message in messages -%}\n"
        "{%- if message['role'] == 'assistant' -%}{%- set role = 'model' -%}\n"
        "{%- else -%}{%- set role = message['role'] -%}{%- endif -%}\n"
        "{{ '<start_of_turn>' + role + '\n' + (message['content'] | trim) }}"
        "{{ '<end_of_turn>\n' }}\n"
        "{%- endfor -%}\n{%- if add_generation_prompt -%}"
        "{{ '<start_of_turn>model\n' }}{%- endif -%}"
    )
    chat = render(gemma, bos_token="<bos>")
    assert chat == ChatFormat(
        before="<bos><start_of_turn>user\n",
        after="<end_of_turn>\n<start_of_turn>model\n",
        strips_start=True,
        strips_end=True,
    )
    assert chat.clean("  a b\n") == "a b"
    # Blocks are trimmed as in transformers, and its additions are known.
    text = (
        "{% for m in messages %}\n  {% generation %}[{{ m.content }}]{% endgeneration %}\n\n"
        "{% break %}\n{% endfor %}"
    )
    assert render(text) == ChatFormat(before="[", after="]\n")
    assert render("{{ messages | tojson }}").before == '[{"role": "user", "content": "'
    # No template can know the day.
    assert render("{{ messages[0].content }}{{ strftime_now is defined }}").after == "False"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content", "the chat template fails: TemplateSyntaxError"),
        ("{{ raise_exception('only with tools') }}", "fails: TemplateError: only with tools"),
        ("hello", "does not contain the user's message exactly once"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "exactly once"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails: SecurityError"),
        ("{{ messages.append(1) }}", "fails: SecurityError"),
        ("{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}", "more than 65536"),
        ("{{ 'a' * 10**10 }}", "fails: out of memory"),
        ("x" * 200_000, r"has 200,000 characters; at most 131,072"),
    ],
)
def test_templates_that_are_refused(template: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        render(template)
    assert str(error.value).startswith("model: ") and "\n" not in str(error.value)


def test_a_template_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_CPU_SECONDS", 1)
    loop = "{% for i in range(99999) %}"
    with pytest.raises(UserError, match=r"too much memory or time|longer than"):
        render(f"{loop}{loop}{loop}{{% endfor %}}{{% endfor %}}{{% endfor %}}")


def test_the_template_of_smollm2(smollm2: Path) -> None:
    words = load_vocabulary(smollm2)
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    rendered = (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHello!<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    # The ordinary encoding of the rendered text recognizes its special tokens.
    assert words.encode_input("Hello!", chat=True) == words.encode(rendered)
    assert words.encode_input("Hello!", chat=True)[:4] == [1, 9690, 198, 2683]


MESSAGES = st.lists(
    st.one_of(st.text(max_size=8), st.sampled_from(CORPUS), st.sampled_from(SPECIAL)), max_size=4
).map("".join)


@settings(deadline=None, max_examples=100)
@given(message=MESSAGES)
def test_messages_cannot_contain_special_tokens(words: HfTokenizer, message: str) -> None:
    ids = words.encode_input(message, chat=True)
    head, tail = [1], [2, *words.encode("\n"), 1, *words.encode("assistant\n")]
    assert ids[:1] == head and ids[-len(tail) :] == tail
    assert len(tail) == words.num_kept_at_end(chat=True)
    inside = ids[1 : -len(tail)]
    assert {0, 1, 2}.isdisjoint(inside)
    assert words.decode(inside) == f"user\n{message}"
    if not any(special in message for special in SPECIAL):
        text = f"<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n"
        assert ids == words.encode(text)


def test_text_is_encoded_together_with_the_template(tmp_path: Path) -> None:
    """Pieces may reach over the ends of a message."""
    template = "{{ 'light' + messages[0].content + 'er' }}"
    config = {"eos_token": "<|im_end|>", "chat_template": template}
    words = HfTokenizer(byte_level(tmp_path, config=config))
    assert words.encode_input("house keep", chat=True) == words.encode("lighthouse keeper")


@pytest.mark.parametrize("prefix", [True, False])
def test_special_pieces_of_sentencepiece_stay_text(tmp_path: Path, prefix: bool) -> None:
    template = "{{ bos_token }}[INST] {{ messages[0].content }} [/INST]"
    metadata = llama_metadata(sentencepiece_model(prefix=prefix), prefix=prefix)
    metadata["tokenizer.chat_template"] = template
    words = HfTokenizer(write_gguf(tmp_path / "model.gguf", metadata))
    ids = words.encode_input("a </s><s> b", chat=True)
    assert ids[0] == 1 and {0, 1, 2}.isdisjoint(ids[1:])
    assert words.decode(ids) == "[INST] a </s><s> b [/INST]"
    assert words.encode_input("the ships", chat=True) == [
        1,
        *words.encode("[INST] the ships [/INST]"),
    ]


def test_pieces_that_include_special_tokens_stay_text(tmp_path: Path) -> None:
    """Unigram prefers its special pieces, whose score is 0."""
    import tokenizers

    pieces = [(piece, 0.0) for piece in ("<unk>", "</s>")]
    pieces += [(piece, -1.0) for piece in ("▁", "<", "/", "s", ">", "a", "</")]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = tokenizers.decoders.Metaspace(prepend_scheme="first")
    made.add_special_tokens(["<unk>", "</s>"])
    (tmp_path / "tokenizer.json").write_text(made.to_str())
    config = {"eos_token": "</s>", "chat_template": "{{ eos_token + messages[0].content }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    words = HfTokenizer(tmp_path / "tokenizer.json")
    pieces_of = [words.pieces(i) for i in words.encode_input("a</s>a", chat=True)]
    assert pieces_of[0] == "</s>" and pieces_of.count("</s>") == 1
    assert "".join(pieces_of[1:]).replace("▁", "") == "a</s>a"
    # Behind a special token, no blank is added, as in the encoding of the whole text.
    assert words.encode_input("aa", chat=True) == words.encode("</s>aa")


def test_templates_come_from_three_files(tmp_path: Path) -> None:
    other = "[{{ messages[0].content }}]"
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": other}]
    config: dict[str, Any] = {"eos_token": "<|im_end|>"}
    file = byte_level(tmp_path, config={**config, "chat_template": named})
    assert HfTokenizer(file).chat_format == ChatFormat(before="[", after="]")
    (tmp_path / "chat_template.jinja").write_text(CHAT)
    assert HfTokenizer(file).chat_format.before == "<|im_start|>user\n"


def test_without_a_template(tmp_path: Path) -> None:
    file = byte_level(tmp_path)
    with pytest.raises(UserError, match=r"this model has no chat template; set it to False"):
        HfTokenizer(file).encode_input("a", chat=True)
    with pytest.raises(UserError, match=r"ByteVocabulary.* has no chat template"):
        ByteVocabulary().encode_input("a", chat=True)


def task_of(*texts: str) -> Task:
    rows = [{"inputs": text, "targets": "yes"} for text in texts]
    source = Source(
        splits=("train",), rows=lambda *_: rows, fingerprint=lambda split, data_dir: "1"
    )
    return Task(name="mine", source=source)


def test_the_cache_knows_the_template(words: HfTokenizer, tmp_path: Path) -> None:
    def encoded(vocabulary: HfTokenizer, *, chat: bool) -> list[int]:
        examples = tokenize(
            task_of("a text"),
            "train",
            vocabulary,
            inputs_length=64,
            targets_length=8,
            chat=chat,
            cache_dir=tmp_path / "cache",
        )
        return examples.inputs[0].tolist()

    for _ in range(2):
        assert encoded(words, chat=False) == words.encode("a text")
        assert encoded(words, chat=True) == words.encode_input("a text", chat=True)
    config = {"eos_token": "<|im_end|>", "chat_template": "[{{ messages[0].content }}]"}
    other = HfTokenizer(byte_level(tmp_path / "other", config=config))
    assert other.fingerprint == words.fingerprint  # ordinary texts have the same ids
    assert encoded(other, chat=True) == words.encode("[a text]")
    assert len(os.listdir(tmp_path / "cache")) == 3


def test_messages_are_cut_and_templates_are_not(words: HfTokenizer) -> None:
    def examples(length: int) -> Any:
        return tokenize(
            task_of("short", "a long text " * 9),
            "train",
            words,
            inputs_length=length,
            targets_length=8,
            chat=True,
            use_cache=False,
        )

    around = len(words.encode_input("", chat=True))
    found = examples(around + 5)
    assert found.num_inputs_cut == 1
    for number, row in enumerate(found.inputs.padded([0, 1], around + 5, padding=-1)):
        whole = found.inputs[number].tolist()
        kept = words.num_kept_at_end(chat=True)
        cut = words.cut_input(whole, around + 5, kept_at_end=kept)
        assert row.tolist() == cut + [-1] * (around + 5 - len(cut))
        assert cut[-kept:] == whole[-kept:]
    with pytest.raises(UserError, match=rf"inputs_length is {around} and the chat template alone"):
        examples(around)
