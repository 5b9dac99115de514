"""Reads WordNet's database into tokenized groups of words with glosses, for pre-training.

The folder must contain ``data.noun``, ``data.verb``, ``data.adj`` and ``data.adv`` (man page
wndb(5)).  Debian's package ``wordnet-base`` installs them in /usr/share/wordnet.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prompt_tuning_jax.data.vocabularies.vocab import AnyVocabulary
from prompt_tuning_jax.errors import UserError

_PARTS = ("noun", "verb", "adj", "adv")
_LONGEST_WORD = 4  # tokens
_LONGEST_GLOSS = 20
_FEWEST_IN_GROUP = 6
# Number of the lexicographer file (lexnames(5)) -> a word that names its contents.
_CATEGORIES = {
    4: "act", 5: "animal", 6: "thing", 7: "quality", 8: "body", 9: "thought", 10: "speech",
    11: "event", 12: "feeling", 13: "food", 14: "group", 15: "place", 17: "nature", 18: "person",
    20: "plant", 21: "money", 22: "process", 23: "number", 24: "relation", 25: "shape",
    26: "state", 27: "substance", 28: "time",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sense:
    """The words that share one meaning and its gloss, as token ids."""

    words: tuple[list[int], ...]
    gloss: list[int]


@dataclass(frozen=True, kw_only=True)
class Dictionary:
    """Senses, and groups of related senses.

    Each of ``categories`` is a group with its name in tokens, such as person, place or food.  Each
    of ``kinds`` holds the direct hyponyms of one noun or verb.  Each of ``opposites`` is a pair of
    groups of similar adjectives whose heads are antonyms.
    """

    senses: tuple[Sense, ...]
    short_senses: tuple[Sense, ...]  # senses with at least one single-token word
    categories: tuple[tuple[list[int], list[Sense]], ...]
    kinds: tuple[list[Sense], ...]
    opposites: tuple[tuple[list[Sense], list[Sense]], ...]


@dataclass(frozen=True, kw_only=True)
class _Synset:
    key: str  # part of speech and offset
    category: int
    words: list[str]
    gloss: str
    pointers: list[tuple[str, str]]  # symbol, key


def load_dictionary(folder: str | os.PathLike[str], vocabulary: AnyVocabulary) -> Dictionary:
    """Reads and tokenizes the dictionary in ``folder``.

    Raises UserError if a file is missing, unreadable or not a WordNet database.
    """
    synsets: dict[str, _Synset] = {}
    for part in _PARTS:
        file = Path(folder) / f"data.{part}"
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{file}: cannot read WordNet's database ({error}); data.dictionary is the folder "
                f"of data.noun (Debian: apt install wordnet-base, then /usr/share/wordnet)"
            ) from None
        try:
            synsets |= {synset.key: synset for synset in _parse(text, part[0])}
        except (ValueError, IndexError):
            raise UserError(f"{file}: not a WordNet database file") from None

    senses: dict[str, Sense] = {}
    glosses = vocabulary.encode_batch([synset.gloss for synset in synsets.values()])
    for (key, synset), gloss in zip(synsets.items(), glosses, strict=True):
        words = tuple(vocabulary.encode_batch(synset.words))
        words = tuple(word for word in words if 0 < len(word) <= _LONGEST_WORD)
        if words and gloss:
            senses[key] = Sense(words=words, gloss=gloss[:_LONGEST_GLOSS])

    by_category: dict[int, list[Sense]] = defaultdict(list)
    by_parent: dict[str, list[Sense]] = defaultdict(list)
    clusters: dict[str, list[Sense]] = defaultdict(list)
    for key, sense in senses.items():
        by_category[synsets[key].category].append(sense)
        for symbol, other in synsets[key].pointers:
            if symbol == "@":
                by_parent[other].append(sense)
            elif symbol == "&":
                clusters[other].append(sense)
    pairs = {
        tuple(sorted((key, other)))
        for key in clusters
        for symbol, other in synsets[key].pointers
        if symbol == "!" and other in clusters
    }
    groups = ((clusters[a], clusters[b]) for a, b in sorted(pairs))
    return Dictionary(
        senses=tuple(senses.values()),
        short_senses=tuple(s for s in senses.values() if min(map(len, s.words)) == 1),
        categories=tuple(
            (vocabulary.encode(name), by_category[number])
            for number, name in _CATEGORIES.items()
            if by_category[number]
        ),
        kinds=tuple(g for _, g in sorted(by_parent.items()) if len(g) >= _FEWEST_IN_GROUP),
        opposites=tuple((a, b) for a, b in groups if min(len(a), len(b)) >= _FEWEST_IN_GROUP // 2),
    )


def _parse(text: str, part: str) -> Iterator[_Synset]:
    for line in text.splitlines():
        if line.startswith("  "):  # the license
            continue
        data, _, gloss = line.partition(" | ")
        fields = data.split()
        count = int(fields[3], 16)
        words = fields[4 : 4 + 2 * count : 2]
        start = 5 + 2 * count
        pointers = [
            (fields[start + 4 * i], fields[start + 4 * i + 2] + fields[start + 4 * i + 1])
            for i in range(int(fields[start - 1]))
        ]
        yield _Synset(
            key=part + fields[0],
            category=int(fields[1]),
            # A suffix as in "galore(ip)" marks an adjective that is limited to one position.
            words=[word.split("(")[0].replace("_", " ") for word in words],
            gloss=gloss.split('; "')[0].strip(),
            pointers=pointers,
        )
