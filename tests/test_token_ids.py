"""A model's own ids of padding, end and start: the same model, renumbered, computes the same."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.convert_model import convert_to_hf, convert_to_t5x
from prompt_tuning_jax.checkpoints.fingerprint import fingerprint
from prompt_tuning_jax.checkpoints.hf.pretrained import open_hf, read_hf, write_hf
from prompt_tuning_jax.config.experiment import Data, Experiment
from prompt_tuning_jax.data.batching.example_cache import make_ragged
from prompt_tuning_jax.data.batching.loader import TrainBatches, eval_batches
from prompt_tuning_jax.data.batching.tokenize import TokenizedExamples
from prompt_tuning_jax.data.tasks.registry import get_task
from prompt_tuning_jax.data.vocabularies.vocab import ByteVocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.api import generate, score, token_ids
from prompt_tuning_jax.inference.ensemble import score_labels
from prompt_tuning_jax.methods import PromptTuning
from prompt_tuning_jax.methods.prompt import with_prompt
from prompt_tuning_jax.models.config import TokenIds
from prompt_tuning_jax.models.t5.model import T5
from prompt_tuning_jax.pretraining.text_data import build_text_data
from tests.micro import ONE_LAYER, D, V, make_t5, normal, token_rows

SOURCE = token_rows([5, 3, 6], 7)
TARGET = token_rows([4, 2, 3], 5, seed=1)
PROMPT_PD = normal(3, D, seed=2)
MODEL = make_t5(ONE_LAYER)
TABLE, HEAD = "token_embedder/embedding", "decoder/logits_dense/kernel"


@dataclass(frozen=True)
class Renumbered:
    """Every token ``shift`` ids further on, those with a meaning of their own too."""

    shift: int

    @property
    def ids(self) -> TokenIds:
        return TokenIds(pad=self.shift % V, eos=(1 + self.shift) % V, start=self.shift % V)

    def model(self) -> T5:
        model = make_t5(replace(ONE_LAYER, token_ids=self.ids))
        params = param_tree.split(model)[1]
        moved = {
            **params,
            TABLE: jnp.roll(params[TABLE], self.shift, axis=0),
            HEAD: jnp.roll(params[HEAD], self.shift, axis=1),
        }
        param_tree.fill(model, moved)
        return model

    def of(self, ids: Any) -> Any:
        return (np.asarray(ids) + self.shift) % V


# Padding is 7; the end is 0 and padding the last id.
PAD_7, EOS_0 = Renumbered(7), Renumbered(-1)


# Each renumbering with every other case: all pairs would compile each program once more.
@pytest.mark.parametrize(
    ("other", "placement"),
    [(PAD_7, "prefix"), (EOS_0, "before_eos")],
    ids=["pad_7 prefix", "eos_0 before_eos"],
)
def test_scores_are_the_same(other: Renumbered, placement: Any) -> None:
    method = PromptTuning(length=3, placement=placement)

    def of(model: T5, source: Any, target: Any) -> Any:
        return score(with_prompt(model, PROMPT_PD, method), source, target)

    want = of(MODEL, SOURCE, TARGET)
    got = of(other.model(), other.of(SOURCE), other.of(TARGET))
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    ("other", "options"),
    [
        (PAD_7, {}),
        (EOS_0, {"strategy": "beam", "num_beams": 3}),
        (PAD_7, {"strategy": "beam", "num_beams": 3, "beam_rule": "hf"}),
        (EOS_0, {"min_length": 5, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2}),
    ],
    ids=["pad_7 greedy", "eos_0 t5x", "pad_7 hf", "eos_0 processors"],
)
def test_what_is_written_is_the_same(other: Renumbered, options: dict[str, Any]) -> None:
    want = generate(MODEL, SOURCE, PROMPT_PD, max_length=6, **options)
    got = generate(other.model(), other.of(SOURCE), PROMPT_PD, max_length=6, **options)
    np.testing.assert_array_equal(got.ids, other.of(want.ids))
    np.testing.assert_allclose(got.scores, want.scores, atol=1e-4)


def examples(ids: TokenIds, of: Callable[[Any], Any]) -> TokenizedExamples:
    texts = [{"inputs": "", "targets": ""}] * len(SOURCE)
    return TokenizedExamples(
        task=get_task("word_valence"),
        split="train",
        inputs=make_ragged([of(row[row != 0]) for row in SOURCE]),
        targets=make_ragged([of(row[row != 0]) for row in TARGET]),
        inputs_length=5,  # one input is cut
        targets_length=5,
        load_texts=lambda: texts,
        token_ids=ids,
    )


@pytest.mark.parametrize(
    ("other", "batches"),
    [(PAD_7, "training"), (EOS_0, "evaluation")],
    ids=["pad_7 training", "eos_0 evaluation"],
)
def test_batches_and_the_loss_are_the_same(other: Renumbered, batches: str) -> None:
    def sums(model: T5, of: Callable[[Any], Any]) -> tuple[float, ...]:
        own = examples(model.token_ids, of)
        if batches == "training":
            batch = TrainBatches(own, batch_size=2, seeds=0)[0]
        else:
            batch = next(eval_batches(own, batch_size=4))  # with a row to spare
        attached = with_prompt(model, PROMPT_PD, PromptTuning(length=3))
        found = jax.jit(attached.token_sums)(batch["inputs"], batch["targets"])
        return tuple(map(float, (found.loss, found.tokens, found.examples, found.correct)))

    np.testing.assert_allclose(
        sums(other.model(), other.of), sums(MODEL, lambda ids: ids), rtol=1e-5
    )


@pytest.mark.parametrize("other", [PAD_7, EOS_0], ids=["pad_7", "eos_0"])
def test_ranking_is_the_same(other: Renumbered) -> None:
    labels_CS = token_rows([2, 4, 3], 4, seed=5)

    def of(model: T5, source: Any, labels: Any) -> Any:
        attached = with_prompt(model, PROMPT_PD, PromptTuning(length=3))
        ids = model.token_ids
        mark = [np.where(np.asarray(x) == ids.pad, ids.fill, x) for x in (source, labels)]
        score = jax.jit(partial(score_labels, attached))
        return score(jnp.asarray(mark[0]), jnp.asarray(mark[1]))

    want = of(MODEL, SOURCE, labels_CS)
    got = of(other.model(), other.of(SOURCE), other.of(labels_CS))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_token_of_a_text_that_has_the_id_of_padding_is_read() -> None:
    ids = TokenIds(pad=ord("a") - 32, eos=2, start=3)
    words = ByteVocabulary(token_ids=ids)
    config = replace(ONE_LAYER, vocab_size=384, token_ids=replace(ids, pad=words.encode("a")[0]))
    model = make_t5(config, vocabulary=words)
    rows = token_ids(model, ["aba", "b"])
    assert rows.tolist() == [[*words.encode("aba"), 1], [*words.encode("b"), 1, -1, -1]]
    assert (model.embed(rows).mask_BU == [[True] * 4, [True, True, False, False]]).all()
    # A target ends where the model ends what it writes, and so does a text that is read back.
    assert token_ids(model, ["b"], targets=True).tolist() == [[*words.encode("b"), 2]]
    assert words.decode([*words.encode("ab"), 2, *words.encode("c")]) == "ab"


def test_padding_that_is_the_end_too() -> None:
    model = make_t5(replace(ONE_LAYER, token_ids=TokenIds(pad=1, eos=1)))
    given = np.asarray([[5, 9, 1, 1], [5, 9, 7, 1]])
    assert token_ids(model, given).tolist() == given.tolist()  # as transformers has it
    targets = token_ids(model, given, targets=True)
    assert targets.tolist() == [[5, 9, 1, -1], [5, 9, 7, 1]]


def test_the_ids_are_written_and_read_back(tmp_path: Path) -> None:
    ids = TokenIds(pad=7, eos=2, start=5)
    config = replace(ONE_LAYER, token_ids=ids)
    params = param_tree.split(make_t5(config))[1]
    write_hf(tmp_path, config, params)
    assert read_hf(tmp_path)[0].token_ids == ids
    assert fingerprint(config, params) != fingerprint(ONE_LAYER, params)


@pytest.mark.parametrize(
    ("file", "ids", "message"),
    [
        ("config.json", {"eos_token_id": [1, 2]}, r"eos_token_id is \[1, 2\]; only one"),
        (
            "config.json",
            {"pad_token_id": -1},
            "pad_token_id is '-1'; it must be an id from 0 to 63",
        ),
        ("config.json", {"decoder_start_token_id": 64}, "decoder_start_token_id is '64'"),
        ("config.json", {"eos_token_id": True}, "eos_token_id is 'True'"),
        ("config.json", {"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ("generation_config.json", {"eos_token_id": 99}, "generation_config.json: eos_token_id"),
        ("generation_config.json", {"decoder_start_token_id": 5}, "make them equal"),
    ],
)
def test_ids_that_cannot_be_are_refused_by_name(
    tmp_path: Path, file: str, ids: dict[str, Any], message: str
) -> None:
    write_hf(tmp_path, ONE_LAYER, param_tree.split(MODEL)[1])
    path = tmp_path / file
    raw = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(raw | ids))
    with pytest.raises(UserError, match=message):
        open_hf(tmp_path)


@pytest.mark.parametrize("value", [2, [2]])
def test_the_end_of_generation_config_decides(tmp_path: Path, value: Any) -> None:
    write_hf(tmp_path, ONE_LAYER, param_tree.split(MODEL)[1])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    assert open_hf(tmp_path)[0].token_ids == TokenIds(eos=2)


def test_only_hugging_face_folders_can_keep_them(tmp_path: Path) -> None:
    config = replace(ONE_LAYER, token_ids=TokenIds(eos=2))
    write_hf(tmp_path / "m", config, param_tree.split(make_t5(config))[1])
    convert_to_hf(str(tmp_path / "m"), tmp_path / "hf")
    assert open_hf(tmp_path / "hf")[0].token_ids == TokenIds(eos=2)
    with pytest.raises(UserError, match=r"padding 0, end 2, start 0.*convert it to hf"):
        convert_to_t5x(str(tmp_path / "m"), tmp_path / "t5x")
    assert not (tmp_path / "t5x").exists()


def test_objectives_are_of_t5s_ids() -> None:
    words = ByteVocabulary(token_ids=TokenIds(eos=2))
    data = Data(train="texts", objectives=("prefix_lm",))
    with pytest.raises(UserError, match=r"data\.objectives .* this model has others"):
        build_text_data(Experiment(data=data), words)
