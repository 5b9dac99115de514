"""What is put around a text, by templates and by tasks."""

import pytest

from prompt_tuning_jax.data.tasks.registry import register
from prompt_tuning_jax.data.tasks.task import Source, Task
from prompt_tuning_jax.data.tasks.wording import (
    AS_IT_IS,
    Wording,
    shared_wording,
    template_of,
    template_of_column,
    wording_of,
)
from prompt_tuning_jax.errors import UserError

TWO = "premise: {premise} hypothesis: {hypothesis}"


@pytest.mark.parametrize(
    ("wording", "given", "expected"),
    [
        (AS_IT_IS, "a text", "a text"),
        (Wording(template="{text}"), "a text", "a text"),
        (Wording(template="say {x}!"), "a text", "say a text!"),
        (Wording(template="say {x}!"), "say a text!", "say say a text!!"),
        (Wording(template="{x} or {x}"), "a", "a or a"),
        (Wording(template="say {x}"), {"x": "a", "id": "7"}, "say a"),
        (Wording(template="say {x}"), {"x": None}, "say "),
        (Wording(template="say {x}"), {"x": 3}, "say 3"),
        (Wording(template="say {x}"), {"x": True}, "say True"),
        (Wording(template=TWO), {"premise": "a", "hypothesis": "b"}, "premise: a hypothesis: b"),
        (Wording(template="{a} {b}"), {"a": "{b}", "b": "x"}, "{b} x"),
        (wording_of("word_valence", ""), "good", "valence: good"),
        (wording_of("word_valence", ""), "valence: good", "valence: good"),
        (wording_of("word_valence", "another {thing}"), "good", "valence: good"),
        (wording_of("word_valence", ""), {"text": "good"}, "valence: good"),
        (wording_of("nobody_knows", "say {x}"), "good", "say good"),
        (wording_of("super_glue_boolq_v102", ""), "as it is", "as it is"),
        (wording_of("data/train.jsonl", "say {x}"), "good", "say good"),
    ],
)
def test_a_text_is_worded(wording: Wording, given: object, expected: str) -> None:
    assert wording.apply(given) == expected  # type: ignore[arg-type]
    if wording.from_text is None:
        assert wording.length_with(given) <= len(expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wording", "given", "message"),
    [
        (Wording(template=TWO), "a text", 'premise, hypothesis: use {"premise": .*raw'),
        (Wording(template=TWO), {"premise": "a", "hypotesis": "b"}, "'hypothesis'.*'hypotesis'"),
        (Wording(template=TWO), {"premise": "a", "hypothesis": ["b"]}, "'hypothesis' is a list"),
        (AS_IT_IS, {"x": "a"}, "the input must be a text"),
    ],
)
def test_what_cannot_be_worded_is_said(wording: Wording, given: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        wording.apply(given)  # type: ignore[arg-type]


def test_the_template_of_a_tasks_function() -> None:
    assert template_of(lambda text: f"say {{{text}}}!") == "say {{{text}}}!"
    assert Wording(template="say {{{text}}}!").apply("x") == "say {x}!"
    assert template_of(lambda text: text) == "{text}"
    assert template_of(lambda text: f"{text} {text}") == ""
    assert template_of(lambda text: text.upper()) == ""
    assert template_of_column("my text") == "{my text}"
    assert not any(map(template_of_column, ("", " a", "{a", "a}")))


def test_a_registered_task_words_by_itself_and_others_by_what_the_file_says() -> None:
    source = Source(splits=(), rows=lambda split, _: [], fingerprint=lambda split, _: "")
    template = "loud: {text}"
    before = wording_of("wording_shouted", template)
    assert before.apply("a") == "loud: a" and before.columns == ("text",)
    register(Task(name="wording_shouted", source=source, from_text=lambda t: f"loud: {t.upper()}"))
    assert wording_of("wording_shouted", template).apply("a") == "loud: A"


def test_prompts_that_vote_have_one_wording() -> None:
    one, other = Wording(template="{text}"), Wording(template="{sentence}")
    assert shared_wording({"a": AS_IT_IS, "b": one, "c": other}) == one
    assert shared_wording({"a": AS_IT_IS}) == AS_IT_IS
    valence = wording_of("word_valence", "")
    assert shared_wording({"a": valence, "b": Wording(template="valence: {word}")}) == valence
    for others in (Wording(template="say {x}"), Wording(template="{a} {b}"), valence):
        with pytest.raises(UserError, match=r"a was trained with the template '{text}' and b with"):
            shared_wording({"a": one, "b": others})
    message = Wording(template="{text}", chat=True)
    assert shared_wording({"a": AS_IT_IS, "b": message}) == message
    assert message.apply("good") == "good"  # the tokenizer knows the template
    with pytest.raises(UserError, match=r"template '{text}' and b with '{text} as a chat message'"):
        shared_wording({"a": one, "b": message})
    with pytest.raises(UserError):  # objects name their columns
        shared_wording({"a": Wording(template="{a} {b}"), "b": Wording(template="{b} {a}")})


@pytest.mark.parametrize("template", ["no column", "{", "{}", "{a}" * 4000])
def test_a_template_that_is_none_is_refused(template: str) -> None:
    with pytest.raises(UserError, match="inputs_template"):
        wording_of("", template)
