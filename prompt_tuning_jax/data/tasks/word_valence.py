"""The bundled task: classify a word as positive or negative.

The human ratings come from the package vaderSentiment.  Its lexicon (Hutto & Gilbert 2014, MIT
license) gives each word's mean valence from -4 to 4 over ten raters.  The task uses lower-case
words of at least three letters with a vowel, which excludes emoticons and most chat abbreviations.
The absolute mean must be at least 0.5, because raters disagree about the sign of smaller ones.  A
word that is listed twice has the average of its means.
"""

import hashlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from prompt_tuning_jax.data.tasks.metrics import get_metric
from prompt_tuning_jax.data.tasks.task import Example, Row, Source, Task
from prompt_tuning_jax.errors import UserError

# Words of praise and blame that suit the old books on which the bundled model was trained; there,
# "positive" means certain.
LABELS = ("terrible", "beautiful")
MIN_ABS_MEAN = 0.5

_WORD = re.compile(r"(?=.*[aeiouy])[a-z]{3,}")
# Suffixes as spelled after doubled letters are merged.  The longest match is removed repeatedly, as
# long as three letters remain.
_SUFFIXES_AS_TEXT = (
    "ability able ably age al aly ance ant ate ated ating ation ative atory cy dom e ed en ence er "
    "est et ful fuly hod ial ic ical ied ier ies iest ify ily ines ing ingly ion ious ish ism ist "
    "ition itive ity ive ization ize les ly ment nes or ous red ship some tion uous y"
)
_SUFFIXES = sorted(_SUFFIXES_AS_TEXT.split(), key=lambda suffix: (-len(suffix), suffix))


def crude_stem(word: str) -> str:
    """Returns a stem of at most four letters, which determines the split of a word.

    Related words share a stem and thus a split; otherwise a model could score well by spelling.
    Unrelated words may share a stem too, which does no harm here.

    >>> {crude_stem(word) for word in ("love", "loved", "lovely", "lovingly", "lovers")}
    {'lov'}
    """
    stem = word[:-1] if re.fullmatch(r"..+[^s]s", word) else word
    stem = re.sub(r"(.)\1", r"\1", stem)  # winner -> winer
    ends: str | None = ""
    while ends is not None:
        ends = next((e for e in _SUFFIXES if stem.endswith(e) and len(stem) - len(e) >= 3), None)
        stem = stem[: -len(ends)] if ends else stem
    stem = stem[:4]
    # The suffix may have included the vowel before it: admir(e) and adm(ire)d.
    return stem[:3] if stem[3:] in tuple("aeiouy") else stem


def split_of(word: str) -> str:
    """Returns a word's split by its stem's hash: about 80 % train, 10 % validation, 10 % test."""
    tenth = int(hashlib.sha256(crude_stem(word).encode()).hexdigest(), 16) % 10
    return {0: "test", 1: "validation"}.get(tenth, "train")


_BEFORE = "valence: "


def read_lexicon(path: Path) -> dict[str, float]:
    """Returns {word: mean} of the words used.

    Lines are ``token <tab> mean <tab> std <tab> ratings``.
    """
    means: dict[str, list[float]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        fields = line.split("\t")
        if not _WORD.fullmatch(fields[0]):
            continue
        try:
            means.setdefault(fields[0], []).append(float(fields[1]))
        except (IndexError, ValueError):
            raise UserError(f"{path}:{number}: not a line of the VADER lexicon") from None
    averaged = {word: sum(values) / len(values) for word, values in means.items()}
    return {word: mean for word, mean in averaged.items() if abs(mean) >= MIN_ABS_MEAN}


def _lexicon_path() -> Path:
    # Located without importing the package, which would import an HTTP client.
    spec = importlib.util.find_spec("vaderSentiment")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "vader_lexicon.txt"
        if path.is_file():
            return path
    raise UserError("task 'word_valence' needs a package: pip install vaderSentiment")


def _rows(split: str, data_dir: str) -> Iterator[Row]:
    for word, mean in sorted(read_lexicon(_lexicon_path()).items()):
        if split_of(word) == split:
            yield {"word": word, "mean": mean}


def _fingerprint(split: str, data_dir: str) -> str:
    return hashlib.sha256(_lexicon_path().read_bytes()).hexdigest()


def word_valence(row: Row) -> list[Example]:
    """{word, mean} -> one example."""
    return [{"inputs": from_text(row["word"]), "targets": LABELS[row["mean"] > 0]}]


def from_text(word: str) -> str:
    """Returns the inputs for a word; inputs are returned unchanged."""
    return word if word.startswith(_BEFORE) else f"{_BEFORE}{word}"


TASKS = (
    Task(
        name="word_valence",
        source=Source(splits=("train", "validation", "test"), rows=_rows, fingerprint=_fingerprint),
        preprocess=word_valence,
        labels=LABELS,
        metrics=(get_metric("accuracy"), get_metric("f1_macro", labels=LABELS)),
        from_text=from_text,
        description="is a word positive or negative? Human ratings of 6,500 English words",
    ),
)
