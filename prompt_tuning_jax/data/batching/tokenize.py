"""Tokenizes the examples of a task once, and caches them without truncation."""

import functools
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from prompt_tuning_jax.data.batching.example_cache import (
    Entry,
    Ragged,
    cache_key,
    default_cache_dir,
    make_ragged,
    open_entry,
    write_entry,
)
from prompt_tuning_jax.data.images.task import ImageSource
from prompt_tuning_jax.data.tasks.labels import is_rewritten
from prompt_tuning_jax.data.tasks.task import Example, Task, same_value, task_index_id
from prompt_tuning_jax.data.vocabularies.vocab import T5_IDS, AnyVocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.config import TokenIds

_TEXTS_AT_ONCE = 4096

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TokenizedExamples:
    """A split of a task as token ids, and the lengths to which batches of it are cut and padded.

    Attributes:
      task, split: the source.
      inputs, targets: untruncated token ids, with all special tokens.
      inputs_length, targets_length: in tokens, special ones included.
      load_texts: reads the examples as text.
      note: what readers of scores on these examples must know (``Source.note``).
      token_ids: the model's, for padding and the decoder's start.
      read_back: texts -> texts after encoding and decoding; None if they do not change.
    """

    task: Task
    split: str
    inputs: Ragged
    targets: Ragged
    inputs_length: int
    targets_length: int
    load_texts: Callable[[], list[Example]]
    note: str = ""
    token_ids: TokenIds = T5_IDS
    read_back: Callable[[Sequence[str]], list[str]] | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    @functools.cached_property
    def texts(self) -> list[Example]:
        """The examples as text, in the same order; read on first use."""
        return self.load_texts()

    @property
    def num_inputs_cut(self) -> int:
        """The number of inputs that are longer than ``inputs_length``."""
        return self.inputs.num_longer_than(self.inputs_length)

    @property
    def num_targets_cut(self) -> int:
        """The number of targets that are longer than ``targets_length``."""
        return self.targets.num_longer_than(self.targets_length)

    @property
    def title(self) -> str:
        """The name of the set in messages: the user's file, or TASK/SPLIT."""
        return self.task.source.display_names.get(self.split, f"{self.task.name}/{self.split}")

    @functools.cached_property
    def rewritten(self) -> dict[str, str]:
        """Targets and labels that change in encoding and decoding -> what they become.

        Those that the task's metrics treat as equal are left out.
        """
        if self.read_back is None:
            return {}
        first = {example["targets"]: example for example in reversed(self.texts)}
        texts = [*dict.fromkeys([*first, *self.task.labels])]
        changed = {}
        for text, back in zip(texts, self.read_back(texts), strict=True):
            if back == text:
                continue
            compare, example = self.task.postprocess, first.get(text, {})
            same = compare is not None and text in first
            if same and compare is not None:
                same = same_value(compare(text, example, True), compare(back, example, False))
            if not same:
                changed[text] = back
        return changed

    def score(self, predictions: Sequence[str]) -> dict[str, float]:
        """Returns the task's metrics of predicted texts, one per example in the same order."""
        return self.task.score(self.texts, self.as_written(predictions))

    def as_written(self, predictions: Sequence[str]) -> list[str]:
        """Returns predicted texts, one per example, in the spelling of targets and labels.

        The decoded form of a label counts as that label, and that of a target as that target, if no
        letters are lost.
        """
        back = self.rewritten
        if not back:
            return list(predictions)
        written = Counter(back.get(label, label) for label in self.task.labels)
        labels = {
            back[label]: label
            for label in self.task.labels
            if label in back and written[back[label]] == 1
        }

        def original(prediction: str, target: str) -> str:
            if prediction in labels:
                return labels[prediction]
            same = prediction == back.get(target) and is_rewritten(target, prediction)
            return target if same else prediction

        pairs = zip(predictions, self.texts, strict=True)
        return [original(prediction, example["targets"]) for prediction, example in pairs]

    def rewritten_notes(self) -> Iterator[str]:
        """Notes on targets that change in encoding and decoding, one line per kind."""
        counts = Counter(example["targets"] for example in self.texts)
        for lost in (False, True):
            texts = [t for t, b in self.rewritten.items() if is_rewritten(t, b) is not lost]
            if not texts:
                continue
            number = sum(counts[text] for text in texts)
            example = f"{_short(texts[0])} reads back as {_short(self.rewritten[texts[0]])}"
            if self.task.labels:
                many = f"{len(texts)} label{'s' * (len(texts) != 1)}"
            else:
                many = f"{number:,} target{'s' * (number != 1)}"
            if lost:
                yield f"{self.title}: {many} cannot be represented in this vocabulary: {example}"
            else:
                yield (
                    f"{self.title}: the vocabulary changes {many}: {example}; predictions are "
                    "compared with that"
                )

    def report(self) -> str:
        """Returns one line with the number of examples, their lengths, and the number truncated."""
        line = (
            f"{self.title}: {len(self):,} example{'s' * (len(self) != 1)}, inputs of "
            f"{self.inputs.lengths.mean():.0f} tokens on average and {self.inputs.lengths.max()} "
            f"at most"
        )
        for name, cut, length in (
            ("inputs", self.num_inputs_cut, self.inputs_length),
            ("targets", self.num_targets_cut, self.targets_length),
        ):
            if cut:
                one = name if cut != 1 else name.removesuffix("s")
                line += f"; {cut:,} {one} ({100 * cut / len(self):.1f} %) cut to {length} tokens"
        return f"{line}; {self.note}" if self.note else line

    def digest(self) -> str:
        """Returns a digest of the examples' ids, in their order."""
        digest = hashlib.sha256()
        for array in (
            self.inputs.offsets,
            self.inputs.flat,
            self.targets.offsets,
            self.targets.flat,
        ):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def select(self, indices: np.ndarray) -> "TokenizedExamples":
        """Returns the examples at ``indices``, in that order."""
        return replace(
            self,
            inputs=self.inputs.select(indices),
            targets=self.targets.select(indices),
            load_texts=lambda: [self.texts[int(i)] for i in indices],
        )

    def at_most(self, number: int) -> "TokenizedExamples":
        """Returns at most ``number`` evenly spaced examples (files may be sorted by label).

        0 means all.  Examples that are scored together, such as the answers to a question, come
        together: the result then has whole groups, and may have fewer examples.
        """
        if not 0 < number < len(self):
            return self
        groups: dict[int | str, list[int]] = {}
        for index, example in enumerate(self.texts if self.task.postprocess else ()):
            group = self.task.group_of(example)
            groups.setdefault(index if group is None else group, []).append(index)
        if len(groups) in (0, len(self)):
            return self.select(np.arange(number) * len(self) // number)
        members = list(groups.values())
        for count in range(max(1, number * len(members) // len(self)), 0, -1):
            chosen = [members[i * len(members) // count] for i in range(count)]
            if sum(map(len, chosen)) <= number:
                break
        return self.select(np.sort(np.concatenate(chosen)))

    def drawn(self, number: int, *, seed: int) -> "TokenizedExamples":
        """Returns at most ``number`` examples, drawn at random and kept in their order; 0: all."""
        if not 0 < number < len(self):
            return self
        random = np.random.default_rng(seed)
        return self.select(np.sort(random.permutation(len(self))[:number]))


def tokenize(
    task: Task,
    split: str,
    vocabulary: AnyVocabulary,
    *,
    inputs_length: int,
    targets_length: int,
    data_dir: str = "",
    chat: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    use_cache: bool = True,
) -> TokenizedExamples:
    """Tokenizes a split of a task, or opens the cache of an earlier call.

    Args:
      task: the task.
      split: one of its splits.
      vocabulary: for the ids.
      inputs_length: in tokens, special ones included.  The cache has untruncated ids, so other
        lengths use the same entry.
      targets_length: likewise.
      data_dir: passed to the task's source.
      chat: whether inputs are messages in the vocabulary's chat template.
      cache_dir: default ``default_cache_dir()``; if that cannot be written, the examples stay in
        memory, with a warning.
      use_cache: False neither reads nor writes the cache.

    Raises UserError for an unknown split, an empty one, a label longer than ``targets_length``, two
    labels of the same tokens, a ``cache_dir`` that cannot be written, and an ``inputs_length`` that
    leaves no room for a text.
    """
    _check_lengths(inputs_length, targets_length)
    if isinstance(task.source, ImageSource):
        raise UserError(
            f"{task.source.display_names.get(split, task.name)} holds images, and this model reads "
            "text: set model.name_or_path to a vision transformer"
        )
    check_labels(task, vocabulary, targets_length=targets_length)
    kept = vocabulary.num_kept_at_end(chat=chat, ending=task.inputs_ending)
    _check_room(vocabulary, inputs_length, task.inputs_ending, kept, chat=chat)
    build = functools.partial(_build, task, split, vocabulary, data_dir, chat=chat)
    if use_cache:
        parts = [
            split,
            task.fingerprint(split, data_dir),
            vocabulary.fingerprint,
            vocabulary.input_format(chat=chat),
        ]
        folder = Path(cache_dir or default_cache_dir()) / cache_key(parts)
        about = {"task": task.name, "split": split, "vocabulary": repr(vocabulary)}
        entry = _open_or_build(folder, build, about, must_write=cache_dir is not None)
    else:
        entry = build()
    return TokenizedExamples(
        task=task,
        split=split,
        inputs=replace(entry.inputs, kept_at_end=kept),
        targets=entry.targets,
        inputs_length=inputs_length,
        targets_length=targets_length,
        load_texts=entry.load_texts,
        note=task.source.note(split, data_dir),
        token_ids=vocabulary.token_ids,
        read_back=functools.partial(_read_back, vocabulary),
    )


def encode_inputs(
    vocabulary: AnyVocabulary, texts: Sequence[str], *, index: int | None, chat: bool = False
) -> list[list[int]]:
    """Returns the token ids of inputs.

    With an ``index``, the token for the task comes before the text.
    """
    rows = vocabulary.encode_inputs(texts, chat=chat)
    if index is None:
        return rows
    token, start = task_index_id(vocabulary.size, index), len(vocabulary.input_start)
    return [[*ids[:start], token, *ids[start:]] for ids in rows]


def check_labels(task: Task, vocabulary: AnyVocabulary, *, targets_length: int) -> None:
    """Raises UserError if a label is too long, or two labels have the same tokens.

    A label has at most ``targets_length`` tokens.
    """
    seen: dict[tuple[int, ...], str] = {}
    for label in task.labels:
        ids = tuple(vocabulary.encode_target(label))
        if len(ids) > targets_length:
            raise UserError(
                f"task {task.name!r}: the label {label!r} has {len(ids)} tokens, the end of "
                f"sequence included, and data.targets_length is {targets_length}; increase it"
            )
        if ids in seen:
            raise UserError(
                f"task {task.name!r}: the labels {seen[ids]!r} and {label!r} have the same tokens "
                "in this vocabulary; rename one"
            )
        seen[ids] = label


def _check_lengths(inputs_length: int, targets_length: int) -> None:
    for field, length in (("inputs_length", inputs_length), ("targets_length", targets_length)):
        if length < 1:
            raise UserError(f"data.{field} is {length} and must be at least 1")


def _check_room(
    vocabulary: AnyVocabulary, inputs_length: int, ending: str, kept: int, *, chat: bool
) -> None:
    if ending and kept >= inputs_length:
        raise UserError(
            f"data.inputs_length is {inputs_length}, and the end of the template alone, "
            f"{ending[-40:]!r}, has {kept} tokens, which are kept; increase it, or shorten the "
            "template"
        )
    if not chat:
        return
    around = len(vocabulary.encode_input("", chat=True))
    if inputs_length <= around:
        raise UserError(
            f"data.inputs_length is {inputs_length} and the chat template alone has {around} "
            "tokens; increase it"
        )


def _open_or_build(
    folder: Path, build: Callable[[], Entry], about: dict[str, str], *, must_write: bool
) -> Entry:
    entry = open_entry(folder)
    if entry is not None:
        return entry
    built = build()
    try:
        write_entry(folder, built, about={**about, "examples": len(built.inputs)})
    except UserError as error:
        if must_write:
            raise
        _log.warning("%s; the examples stay in memory", error)
        return built
    # The memory-mapped entry replaces the examples in memory.
    return open_entry(folder) or built


def _build(
    task: Task, split: str, vocabulary: AnyVocabulary, data_dir: str, *, chat: bool
) -> Entry:
    texts = list(task.load(split, data_dir))
    if not texts:
        raise UserError(f"task {task.name!r}, split {split!r}: there are no examples")
    encode = functools.partial(encode_inputs, vocabulary, index=task.index, chat=chat)
    inputs = _encoded([example["inputs"] for example in texts], encode)
    targets = _encoded([example["targets"] for example in texts], vocabulary.encode_targets)
    return Entry(inputs=make_ragged(inputs), targets=make_ragged(targets), load_texts=lambda: texts)


def _read_back(vocabulary: AnyVocabulary, texts: Sequence[str]) -> list[str]:
    decoded = []
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        for ids in vocabulary.encode_batch(texts[start : start + _TEXTS_AT_ONCE]):
            decoded.append(vocabulary.decode(ids))
    return decoded


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _encoded(
    texts: Sequence[str], encode: Callable[[Sequence[str]], list[list[int]]]
) -> Iterator[np.ndarray]:
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        for ids in encode(texts[start : start + _TEXTS_AT_ONCE]):
            yield np.asarray(ids, np.int32)
