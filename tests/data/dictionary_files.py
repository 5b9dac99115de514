"""A WordNet database of a few senses, in the format of wndb(5), for tests."""

from collections.abc import Sequence
from pathlib import Path

LICENSE = "  1 A license stands before the data.  \n"
ANIMALS = ("dog", "cat", "horse", "cow", "bird", "fish", "mouse")
PLACES = ("town", "city", "village", "country", "street", "island", "river")
GOOD = ("good", "happy", "kind", "noble", "bright")
BAD = ("bad", "evil", "cruel", "dark", "dull")


def line(
    offset: int,
    category: int,
    words: Sequence[str],
    gloss: str,
    pointers: Sequence[tuple[str, int, str]] = (),
    kind: str = "n",
) -> str:
    """One synset; ``pointers`` are of symbol, offset and part of speech."""
    named = " ".join(f"{word} 0" for word in words)
    pointing = "".join(f" {symbol} {to:08d} {part} 0000" for symbol, to, part in pointers)
    head = f"{offset:08d} {category:02d} {kind} {len(words):02x} {named}"
    return f"{head} {len(pointers):03d}{pointing} | {gloss}  \n"


def write_dictionary(folder: Path) -> Path:
    """Two kinds of nouns, one pair of opposite clusters of adjectives."""
    nouns = [line(1, 5, ["animal"], "a living thing"), line(2, 15, ["place"], "where things are")]
    for number, word in enumerate((*ANIMALS, *PLACES)):
        parent = 1 if word in ANIMALS else 2
        category = 5 if word in ANIMALS else 15
        gloss = f'what people call {word}; "the {word} was there"'
        nouns.append(
            line(10 + number, category, [word, f"old_{word}"], gloss, [("@", parent, "n")])
        )
    adjectives = []
    for start, (head, *others) in ((100, GOOD), (200, BAD)):
        antonym = 300 - start
        similar = [("&", start + 1 + number, "a") for number in range(len(others))]
        adjectives.append(
            line(start, 0, [head], f"being {head}", [("!", antonym, "a"), *similar], "a")
        )
        adjectives += [
            line(start + 1 + number, 0, [f"{word}(p)"], f"so {word}", [("&", start, "a")], "s")
            for number, word in enumerate(others)
        ]
    folder.mkdir(parents=True, exist_ok=True)
    for part, lines in (("noun", nouns), ("verb", []), ("adj", adjectives), ("adv", [])):
        (folder / f"data.{part}").write_text(LICENSE + "".join(lines), encoding="utf-8")
    return folder
