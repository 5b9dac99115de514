"""Which T5 an opened model is, in the words that people use for it."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prompt_tuning_jax.checkpoints.fingerprint import fingerprint
from prompt_tuning_jax.checkpoints.hf.config import CONFIG
from prompt_tuning_jax.checkpoints.hf.weights import INDEX_SUFFIX, open_weights
from prompt_tuning_jax.checkpoints.hub import model_location
from prompt_tuning_jax.checkpoints.lazy import LazyArray
from prompt_tuning_jax.checkpoints.load import OpenedModel, open_model
from prompt_tuning_jax.checkpoints.t5x import reader
from prompt_tuning_jax.models.t5.config import PRESETS, T5Config
from prompt_tuning_jax.typing import HostArray
from prompt_tuning_jax.untrusted_input import read_json_file

# The sizes of google-research/byt5, which are its own; mT5's and UMT5's are those of T5 1.1.
_BYTE_SIZES: dict[tuple[int, ...], str] = {
    (1472, 6, 64, 3584, 12, 4): "byt5_small",
    (1536, 12, 64, 3968, 18, 6): "byt5_base",
    (1536, 16, 64, 3840, 36, 12): "byt5_large",
    (2560, 32, 64, 6720, 36, 12): "byt5_xl",
    (4672, 64, 64, 12352, 36, 12): "byt5_xxl",
}
_BYTE_ROWS = 384
_MULTILINGUAL_ROWS = (250_100, 250_112)
_UMT5_ROWS = (256_300, 256_384)
_OWN_RELPOS = re.compile(r"(encoder|decoder)/layers_\d+/relpos_bias/rel_embedding")


def open_source(
    name_or_path: str, *, relpos_max_distance: int | None = None, vocabulary: bool = True
) -> OpenedModel:
    """``load.open_model``, and where a folder is an incomplete T5X checkpoint it says so."""
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        name_or_path = model_location(name_or_path)
        folder = Path(name_or_path)
    traces = (f"{reader.INDEX}_*", "target.*", "state")
    if (
        folder.is_dir()
        and not (folder / CONFIG).exists()
        and any(found for trace in traces for found in folder.glob(trace))
    ):
        reader.open_t5x(folder)
    return open_model(name_or_path, relpos_max_distance=relpos_max_distance, vocabulary=vocabulary)


def architecture(opened: OpenedModel) -> str:
    """Which of the published kinds of T5 it is, as far as shapes and files tell."""
    config, kind = opened.config, _model_type(opened)
    gated = len(config.mlp_activations) == 2
    if kind == "umt5" or config.vocab_size in _UMT5_ROWS:
        return "UMT5"
    if any(_OWN_RELPOS.fullmatch(name) for name in opened.params):
        return "T5 1.1 with a position bias in each layer (UMT5's, and scanned T5X's)"
    if gated and (kind == "mt5" or config.vocab_size in _MULTILINGUAL_ROWS):
        return "mT5"
    if gated and (config.vocab_size == _BYTE_ROWS or _reads_bytes(opened.vocabulary_file)):
        return "ByT5"
    if gated:
        tied = ", with tied embeddings" if config.tie_embeddings else ""
        return f"T5 1.1 (LM-adapted and Flan-T5 are alike){tied}"
    return "T5 1.0" + ("" if config.tie_embeddings else ", with an output layer of its own")


def size_name(config: T5Config) -> str:
    """The preset of these sizes, whatever the vocabulary; empty if there is none."""
    for name, other in PRESETS.items():
        if (_sizes(config), config.mlp_activations) == (_sizes(other), other.mlp_activations):
            return name
    return _BYTE_SIZES.get(_sizes(config), "")


def layout(opened: OpenedModel) -> str:
    """The format in words, with the number of files where weights are in several."""
    source = opened.source
    if isinstance(source, Path):
        file, _ = open_weights(source)
        if file.suffix != ".json":
            return file.name
        shards = len(set(_json(file)["weight_map"].values()))
        return f"{file.name.removesuffix(INDEX_SUFFIX)} in {shards} files"
    kind = "T5X on Orbax" if source.layout == "t5x_orbax" else "T5X native"
    scanned = ", scanned layers" if source.scanned else ""
    return f"{kind}, version {source.version}{scanned}"


def fingerprint_of(opened: OpenedModel) -> str:
    """``checkpoints.fingerprint`` of the model; reads all of it, one array at a time."""
    return fingerprint(opened.config, _ReadLater(opened.params))


class _ReadLater(Mapping[str, HostArray]):
    """Reads an array when it is asked for, and keeps none."""

    def __init__(self, params: Mapping[str, LazyArray]) -> None:
        self._params = params

    def __getitem__(self, name: str) -> HostArray:
        return self._params[name].whole()

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)


def _sizes(config: T5Config) -> tuple[int, ...]:
    return (
        config.embed_dim,
        config.num_heads,
        config.head_dim,
        config.mlp_dim,
        config.num_encoder_layers,
        config.num_decoder_layers,
    )


def _model_type(opened: OpenedModel) -> str:
    if not isinstance(opened.source, Path):
        return ""
    return str(_json(opened.source / CONFIG).get("model_type", ""))


def _reads_bytes(vocabulary_file: Path | None) -> bool:
    """ByT5's vocabulary is in the file that configures it."""
    return vocabulary_file is not None and vocabulary_file.name.endswith(CONFIG)


def _json(path: Path) -> dict[str, Any]:
    """A file that a reader has found to be a JSON object."""
    found: dict[str, Any] = read_json_file(path)
    return found
