import copy
import json
import pickle
import random
from pathlib import Path

import pytest

from prompt_tuning_jax.data.vocabularies.tokenizer_files import vocabulary_file
from prompt_tuning_jax.data.vocabularies.vocab import ByteVocabulary, Vocabulary, load_vocabulary
from prompt_tuning_jax.errors import UserError

TINY = Path(__file__).parents[2] / "prompt_tuning_jax/assets/tiny/spiece.model"


@pytest.fixture(scope="module")
def tiny() -> Vocabulary:
    return Vocabulary(TINY)


@pytest.fixture(scope="module")
def t5(shared: Path) -> Vocabulary:
    return Vocabulary(shared / "fixtures/t5_vocab.model")


def some_ids(size: int, *, count: int) -> list[list[int]]:
    rng = random.Random(0)
    return [
        [rng.choice([0, 1, 2, 3, rng.randrange(size), rng.randrange(2 * size)]) for _ in range(n)]
        for n in (rng.randrange(9) for _ in range(count))
    ]


def test_recorded_cases_of_t5(t5, shared):
    recorded = json.loads((shared / "fixtures/tasks/cases.json").read_text())
    assert len(recorded["vocab_cases"]) > 20
    for case in recorded["vocab_cases"]:
        assert t5.encode(case["text"]) == case["ids"], case
        assert t5.decode(case["ids"]) == case["decoded"], case
    assert t5.size == recorded["vocab"]["vocab_size"]
    assert [t5.sentinel(0)] == recorded["vocab"]["extra_id_0"]
    assert [t5.sentinel(99)] == recorded["vocab"]["extra_id_99"]


def test_is_seqios_sentencepiece_vocabulary(t5):
    seqio = pytest.importorskip("seqio")
    theirs = seqio.SentencePieceVocabulary(str(t5.path), extra_ids=100)
    assert t5.size == theirs.vocab_size
    for ids in some_ids(t5.size, count=2000):
        assert t5.decode(ids) == theirs.decode(ids), ids
    texts = ["<extra_id_0> a <extra_id_7>b c<extra_id_1>", "<extra_id_100>", " a  b\n", "</s>", ""]
    for text in texts:
        assert t5.encode(text) == theirs.encode(text), text


def test_is_seqios_byte_vocabulary():
    seqio = pytest.importorskip("seqio")
    ours, theirs = ByteVocabulary(), seqio.ByteVocabulary(extra_ids=125)
    assert ours.size == theirs.vocab_size == 384
    for ids in some_ids(ours.size, count=2000):
        assert ours.decode(ids) == theirs.decode(ids), ids
    for text in ["", "aé€😀", "<extra_id_0>\n"]:
        assert ours.encode(text) == theirs.encode(text)


def test_bytes_survive_and_sentinels_are_the_last_byte_ids():
    vocabulary = ByteVocabulary()
    assert vocabulary.encode("a") == [ord("a") + 3]
    assert vocabulary.decode(vocabulary.encode("naïve 😀")) == "naïve 😀"
    assert vocabulary.encode_batch(["a", ""]) == [vocabulary.encode("a"), []]
    assert [vocabulary.sentinel(0), vocabulary.sentinel(99)] == [258, 159]
    assert [vocabulary.pieces(i) for i in (0, 1, 2, 100, 198, 258, 259)] == [
        *("<pad>", "</s>", "<unk>", "a", "<0xC3>", "<0xFF>", "<unk>")
    ]


def test_bundled_vocabulary(tiny):
    assert tiny.size == 6000
    assert [tiny.sentinel(0), tiny.sentinel(99)] == [5999, 5900]
    assert [tiny.pieces(i) for i in range(3)] == ["<pad>", "</s>", "<unk>"]
    assert tiny.encode("<extra_id_0> and <extra_id_1>")[::2] == [5999, 5998]
    for word in ("negative", "positive", "True", "False", "neutral", "yes", "no", "the", "of"):
        assert len(tiny.encode(word)) == 1, word
    printable = "".join(map(chr, range(33, 127)))
    assert tiny.decode(tiny.encode(printable)) == printable
    assert tiny.decode(tiny.encode("In 1984, “it” — cost £5; naïve? *yes*")) == (
        "In 1984, “it” — cost £5; na ⁇ ve? *yes*"
    )


def test_decoding_stops_at_the_end_and_drops_padding(tiny):
    text = "all is well"
    ids = tiny.encode(text)
    assert 1 not in ids
    assert tiny.decode([*ids, 1, *ids]) == text
    assert tiny.decode([*ids, 0, 0]) == text
    assert tiny.decode([*ids, 6000]) == tiny.decode([*ids, 2]) == tiny.decode([*ids, -1])
    assert tiny.pieces(6000) == tiny.pieces(-1) == "<unk>"


def test_batches_encode_as_single_texts(tiny):
    texts = ["a b", "", "<extra_id_3> c", "long " * 300]
    assert tiny.encode_batch(texts, num_threads=2) == [tiny.encode(text) for text in texts]


def test_equality_is_of_content(tiny, tmp_path):
    other = tmp_path / "other_name.model"
    other.write_bytes(TINY.read_bytes())
    assert Vocabulary(other) == tiny
    assert hash(Vocabulary(other)) == hash(tiny)
    assert Vocabulary(other, extra_ids=0) != tiny
    assert Vocabulary(other, extra_ids=0).size == 5900
    assert ByteVocabulary() == ByteVocabulary() != tiny
    assert ByteVocabulary(extra_ids=0) != ByteVocabulary()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))])
def test_copies_work(tiny, clone):
    copied = clone(tiny)
    assert copied == tiny
    assert copied.encode("<extra_id_0> yes") == tiny.encode("<extra_id_0> yes")


def test_a_file_that_holds_its_sentinels_gets_no_others(tmp_path, tiny):
    # As mT5's, whose file has the 100 sentinels inside.
    file = tmp_path / "with.model"
    file.write_bytes(tiny._processor.serialized_model_proto())
    vocabulary = Vocabulary(file)
    assert vocabulary.size == 6000
    assert vocabulary.extra_ids == 0
    assert vocabulary.sentinel(0) == 5999


def test_load_vocabulary_takes_files_folders_and_bytes(tiny):
    assert load_vocabulary(TINY) == load_vocabulary(TINY.parent) == tiny
    assert load_vocabulary(TINY, extra_ids=3).size == 5903
    assert load_vocabulary("bytes") == ByteVocabulary()


def test_a_text_that_is_not_utf8_is_a_user_error(tiny):
    for words in (tiny, ByteVocabulary()):
        for encode in (words.encode_inputs, words.encode_targets):
            with pytest.raises(UserError, match=r"'caf\\udce9' has half of a surrogate pair"):
                encode(["fine \U0001f600", b"caf\xe9".decode(errors="surrogateescape")])


def test_bad_files_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="no such vocabulary file"):
        load_vocabulary(tmp_path / "absent.model")
    with pytest.raises(UserError, match=r"has no vocabulary \(spiece.model"):
        load_vocabulary(tmp_path)
    raw = TINY.read_bytes()
    file = tmp_path / "damaged.model"
    # Every cut in the first kilobyte: some of them fall between two pieces.
    for size in [*range(1000), len(raw) // 2, len(raw) - 1]:
        file.write_bytes(raw[:size])
        with pytest.raises(UserError, match=r"damaged\.model: not a SentencePiece model"):
            load_vocabulary(file)
    with pytest.raises(UserError, match="extra_ids is -1; it must be at least 0"):
        load_vocabulary(TINY, extra_ids=-1)


def trained(file, **options):
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f"] * 10), model_writer=model, minloglevel=2, **options
    )
    file.write_bytes(model.getvalue())
    return file


def test_special_ids_elsewhere_are_a_user_error(tmp_path):
    file = trained(tmp_path / "llama.model", vocab_size=10)
    with pytest.raises(UserError, match=r"at ids 0 and 1, but they are at -1 and 2"):
        load_vocabulary(file)


def test_unknown_is_3_in_umt5(tmp_path):
    ids = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
    words = load_vocabulary(trained(tmp_path / "spiece.model", vocab_size=12, **ids))
    assert words.extra_ids == 100 and words.sentinel(0) == words.size - 1
    known, unknown = words.encode("a"), words.encode("x")
    assert 3 in unknown and 3 not in known
    assert words.pieces(10_000) == words.pieces(3) == "<unk>"
    assert words.decode([2, *known, 1, *known]) == "a"
    assert words.decode([10_000]) == words.decode([3]) != words.decode([2])
    with pytest.raises(UserError, match="no sentinel <extra_id_100>"):
        words.sentinel(100)


def test_missing_sentinels_are_a_user_error(tiny):
    with pytest.raises(UserError, match="no sentinel <extra_id_100>"):
        tiny.sentinel(100)
    with pytest.raises(UserError, match="sentinels 0 to 99"):
        ByteVocabulary().sentinel(100)


def test_byte_folders(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "t5", "tokenizer_class": "T5Tokenizer"}))
    assert vocabulary_file(tmp_path) is None
    with pytest.raises(UserError, match=r"config\.json: no vocabulary; use tokenizer\.json"):
        load_vocabulary(config)
    config.write_text(json.dumps({"model_type": "t5", "tokenizer_class": "ByT5Tokenizer"}))
    assert vocabulary_file(tmp_path) == config
    assert load_vocabulary(tmp_path) == ByteVocabulary()
    tokenizer = tmp_path / "tokenizer_config.json"
    tokenizer.write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer", "extra_ids": 7}))
    (tmp_path / "spiece.model").write_bytes(TINY.read_bytes())
    assert vocabulary_file(tmp_path) == tokenizer
    assert load_vocabulary(tmp_path) == ByteVocabulary(extra_ids=7)
    assert load_vocabulary(tokenizer, extra_ids=3) == ByteVocabulary(extra_ids=3)
    for wrong, message in (
        ("{", "invalid or truncated JSON"),
        ("[]", "an array, not a JSON object"),
        ('{"tokenizer_class": "ByT5Tokenizer", "extra_ids": "x"}', "extra_ids is 'x'"),
    ):
        tokenizer.write_text(wrong)
        with pytest.raises(UserError, match=message):
            load_vocabulary(tmp_path)
