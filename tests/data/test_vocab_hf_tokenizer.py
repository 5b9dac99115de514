import copy
import pickle
import sys
from pathlib import Path

import pytest

from prompt_tuning_jax.data.vocabularies.hf_tokenizer import HfTokenizer
from prompt_tuning_jax.data.vocabularies.tokenizer_files import vocabulary_file
from prompt_tuning_jax.data.vocabularies.vocab import Vocabulary, load_vocabulary, require_t5
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.config import TokenIds

TINY = Path(__file__).parents[2] / "prompt_tuning_jax/assets/tiny/spiece.model"
TEXTS = ["The film is good.", "", "a  b", "<extra_id_0> and <extra_id_1>", "naïve 😀", "long " * 99]


@pytest.fixture(scope="module")
def tiny() -> Vocabulary:
    return Vocabulary(TINY, extra_ids=100)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """T5's kind of tokenizer.json, with the pieces of the bundled vocabulary."""
    return write(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


def write(path: Path, *, first: tuple[str, ...] = ("<pad>", "</s>", "<unk>")) -> Path:
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    sentencepiece = pytest.importorskip("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(model_file=str(TINY))
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(len(model))]
    pieces[: len(first)] = [(piece, 0.0) for piece in first]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=first.index("<unk>")))
    made.normalizer = tokenizers.normalizers.Sequence(
        [
            tokenizers.normalizers.NFKC(),
            tokenizers.normalizers.Strip(),
            tokenizers.normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
        ]
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    made.add_special_tokens([*first, *(f"<extra_id_{i}>" for i in reversed(range(100)))])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[(first[1], 1)] if first[1] == "</s>" else [("</s>", 0)]
    )
    made.enable_truncation(5)
    made.enable_padding(length=9)
    path.write_text(made.to_str(), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(file: Path) -> HfTokenizer:
    return HfTokenizer(file)


def test_is_the_vocabulary_of_the_same_pieces(tokenizer: HfTokenizer, tiny: Vocabulary) -> None:
    assert tokenizer.size == tiny.size == 6000
    for text in ["The film is good.", "", "a  b", "all is well", "negative or positive?"]:
        assert tokenizer.encode(text) == tiny.encode(text), text
    ids = tiny.encode("all is well")
    assert 1 not in tokenizer.encode("all is well")
    for more in ([], [0, 0], [1, *ids]):
        assert tokenizer.decode([*ids, *more]) == tiny.decode([*ids, *more]), more
    assert tokenizer.decode([*ids, 9999]) == tokenizer.decode([*ids, 2]) == "all is well<unk>"
    assert tokenizer.decode([]) == ""
    for token_id in (0, 1, 2, 3, 50, 5899, 6000, -1):
        assert tokenizer.pieces(token_id) == tiny.pieces(token_id)
    for index in (0, 7, 99):
        assert tokenizer.sentinel(index) == tiny.sentinel(index)
        assert tokenizer.sentinel(index) in tokenizer.encode(f"a <extra_id_{index}> b")
    with pytest.raises(UserError, match="no sentinel <extra_id_100>"):
        tokenizer.sentinel(100)


def test_neither_cut_nor_padded(tokenizer: HfTokenizer) -> None:
    assert len(tokenizer.encode("long " * 99)) >= 99
    assert tokenizer.encode_batch(TEXTS, num_threads=2) == [tokenizer.encode(t) for t in TEXTS]


def test_equality_and_copies(tokenizer: HfTokenizer, file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_bytes(file.read_bytes())
    for same in (
        HfTokenizer(other),
        copy.deepcopy(tokenizer),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert same == tokenizer
        assert hash(same) == hash(tokenizer)
        assert same.encode("all is well") == tokenizer.encode("all is well")
    other.write_text(file.read_text().replace("▁film", "▁filn"), encoding="utf-8")
    assert HfTokenizer(other) != tokenizer


def test_folders(tokenizer: HfTokenizer, file: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(file.read_bytes())
    assert vocabulary_file(tmp_path) == tmp_path / "tokenizer.json"
    assert load_vocabulary(tmp_path) == load_vocabulary(file) == tokenizer
    with pytest.raises(UserError, match="leave out extra_ids"):
        load_vocabulary(tmp_path, extra_ids=3)
    (tmp_path / "spiece.model").write_bytes(TINY.read_bytes())
    assert load_vocabulary(tmp_path) == Vocabulary(TINY)


def test_unknown_is_3_in_umt5(tmp_path: Path) -> None:
    words = HfTokenizer(
        write(tmp_path / "tokenizer.json", first=("<pad>", "</s>", "<s>", "<unk>")),
        token_ids=TokenIds(),
    )
    require_t5(words)
    ids = words.encode("all is well")
    assert words.decode([2, *ids, 9999, 1, *ids]) == words.decode([*ids, 3]) == "all is well<unk>"
    assert words.pieces(9999) == words.pieces(3) == "<unk>"


def test_wrong_files(file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the vocabulary"):
        load_vocabulary(tmp_path / "tokenizer.json")
    for text in ("", "{}", file.read_text()[:-9]):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(UserError, match=r"not a tokenizer, or a damaged one"):
            load_vocabulary(tmp_path)
    write(tmp_path / "tokenizer.json", first=("</s>", "<pad>", "<unk>"))
    with pytest.raises(UserError, match=r"this file begins with </s>, <pad>, <unk>, "):
        require_t5(load_vocabulary(tmp_path, token_ids=TokenIds()))


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"library, which is not installed: pip install tokenizers"):
        load_vocabulary(tmp_path)
