"""Finds models by name: bundled, published, on this machine, in a bucket or on the hub."""

import hashlib
import logging
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from prompt_tuning_jax.checkpoints.hf.config import is_t5, model_type_of
from prompt_tuning_jax.checkpoints.hf.config_files import CONFIG, GENERATION_CONFIG
from prompt_tuning_jax.checkpoints.hf.image_processor import PREPROCESSOR_CONFIG
from prompt_tuning_jax.checkpoints.hf.weights import FLAX, INDEX_SUFFIX, SAFETENSORS, TORCH
from prompt_tuning_jax.checkpoints.lazy_arrays import progress
from prompt_tuning_jax.checkpoints.location import Bucket, is_address, is_t5x, store_of
from prompt_tuning_jax.config.paths import BUNDLED, GGUF_MODELS, NAMED_MODELS, T5X_MODELS
from prompt_tuning_jax.data.vocabularies.gguf_metadata import GGUF_SUFFIX
from prompt_tuning_jax.data.vocabularies.tokenizer_files import TOKENIZER_FILES
from prompt_tuning_jax.errors import UserError, suggest
from prompt_tuning_jax.storage import atomic_write, expanded, user_cache
from prompt_tuning_jax.untrusted_input import json_text, read_json_file

_log = logging.getLogger(__name__)

ASSETS = Path(__file__).parent.parent / "assets"
# The vocabulary of all these models: 32,000 pieces and 100 sentinels.
T5X_VOCABULARY = "gs://t5-data/vocabs/cc_all.32000.100extra"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_CHECKPOINT = re.compile(r"checkpoint_(\d+)")
_GENERATIONS = ".generations.json"  # the generations of files copied from a bucket
_DESCRIPTION = (CONFIG, GENERATION_CONFIG, PREPROCESSOR_CONFIG, *TOKENIZER_FILES)


def model_location(name: str) -> str:
    """Returns the folder, or the ``gs://`` or ``s3://`` address, of a model.

    ``tiny`` is bundled.  ``t5_1_1_lm100k_base`` and the other sizes are T5X checkpoints in a public
    bucket.  ``smollm2`` and ``gemma3-270m`` are files in the user's cache, where
    ``scripts/fetch_model`` puts them.  A folder, a ``.gguf`` file, a T5X checkpoint that is one
    file, or an address is returned as it is; of a folder of ``checkpoint_<step>``, the last one is
    used.  ``google/flan-t5-small`` or any other ``org/name`` is fetched from the Hugging Face hub
    or taken from its cache.  Raises UserError.
    """
    if name in BUNDLED:
        return str(ASSETS / name)
    if name in T5X_MODELS:
        return T5X_MODELS[name]
    if name in GGUF_MODELS:
        return str(_fetched(name))
    if is_address(name):
        if store_of(name) is None:
            raise UserError(
                f"{name}: models are read only from gs://BUCKET/PATH and s3://BUCKET/PATH"
            )
        return name
    folder = expanded(name)
    if folder.is_dir():
        return str(_newest_checkpoint(folder) or folder)
    if is_gguf(folder) or (folder.is_file() and is_t5x(folder)):
        return str(folder)
    if folder.suffix.lower() == GGUF_SUFFIX:
        raise UserError(f"there is no file {name}")
    if is_hub_name(name):
        last = name.rpartition("/")[2]
        if last in NAMED_MODELS:
            raise UserError(f"there is no folder {name}; did you mean the model {last}?")
        return str(hub_folder(name))
    raise UserError(
        f"model {name!r} is neither a folder nor a known name; "
        f"{suggest(name, NAMED_MODELS)}, and org/name of the Hugging Face hub"
    )


def is_gguf(path: Path) -> bool:
    """Returns whether a path is a file in the GGUF format, by its name."""
    return path.suffix.lower() == GGUF_SUFFIX and path.is_file()


def gguf_cache(name: str) -> Path:
    """Returns where the user's cache holds one of ``GGUF_MODELS``."""
    return user_cache("models") / GGUF_MODELS[name]


def _fetched(name: str) -> Path:
    path = gguf_cache(name)
    if not path.is_file():
        raise UserError(
            f"the model {name} is not in the cache ({path}): fetch it with "
            f"'python scripts/fetch_model {name}'"
        )
    return path


def _newest_checkpoint(folder: Path) -> Path | None:
    """Returns the latest ``checkpoint_<step>`` in a folder.

    Returns None if the folder is itself a model.
    """
    if (folder / CONFIG).exists() or is_t5x(folder):
        return None
    steps = {
        int(match[1]): child
        for child in folder.iterdir()
        if (match := _CHECKPOINT.fullmatch(child.name)) and (child.is_dir() or is_t5x(child))
    }
    if not steps:
        return None
    if len(steps) > 1:
        listed = ", ".join(map(str, sorted(steps)))
        _log.warning("%s has checkpoints of steps %s: using the last", folder, listed)
    return steps[max(steps)]


def hf_folder(location: str) -> Path:
    """Returns the folder on this machine of the Hugging Face model at a ``model_location``.

    A model in a bucket is copied first (``fetch_folder``), but only the files that
    ``hub_folder`` would fetch.
    """
    if not is_address(location):
        return Path(location)

    def choose(there: Iterable[str]) -> list[str]:
        files = list(there)
        for weights in (SAFETENSORS, FLAX, TORCH):
            chosen = _matching(files, [*_DESCRIPTION, *_patterns(weights)])
            if CONFIG in chosen and {weights, weights + INDEX_SUFFIX} & set(chosen):
                # Shards of another model may be beside the single file.
                single = weights in chosen
                return [f for f in chosen if not (single and f in _shards(files, weights))]
        raise UserError(
            f"{location} has no model: neither a T5X checkpoint (checkpoint, or state/_METADATA) "
            f"nor a Hugging Face folder ({CONFIG} and weights)"
        )

    return fetch_folder(location, choose)


def _shards(files: Iterable[str], weights: str) -> list[str]:
    return _matching(files, _patterns(weights)[1:])


def _matching(files: Iterable[str], patterns: Iterable[str]) -> list[str]:
    wanted = list(patterns)
    return [file for file in files if any(fnmatchcase(file, pattern) for pattern in wanted)]


def t5x_vocabulary(name: str) -> Path | None:
    """Returns the vocabulary of a published T5X checkpoint; None if ``name`` is not one."""
    if name not in T5X_MODELS and name.rstrip("/") not in T5X_MODELS.values():
        return None
    file = "sentencepiece.model"
    folder = fetch_folder(T5X_VOCABULARY, lambda there: [f for f in there if f == file])
    if not (folder / file).is_file():
        raise UserError(f"{T5X_VOCABULARY} has no {file}: set model.vocabulary to a file")
    return folder / file


def is_hub_name(name: str) -> bool:
    """Returns whether a name has the form ``org/name``."""
    return _HUB_NAME.fullmatch(name) is not None


def hub_folder(name: str) -> Path:
    """Returns the local folder of a model on the Hugging Face hub.

    Fetches it unless it is in the cache.

    Only the files that are read are fetched: the configuration, the vocabulary, and the weights in
    the first available format of safetensors, Flax (of a T5) and torch.  ``HF_HOME``,
    ``HF_HUB_OFFLINE`` and the hub's token apply.  Raises UserError.
    """
    folder = Path(name)
    for weights in (SAFETENSORS, FLAX, TORCH):
        if weights == FLAX and not _may_be_flax(folder):
            continue
        folder = _snapshot(name, [*_DESCRIPTION, *_patterns(weights)])
        if (folder / weights).is_file() or (folder / (weights + INDEX_SUFFIX)).is_file():
            if not (folder / CONFIG).is_file():
                raise UserError(f"{name}: no {CONFIG} on the hub or in its cache ({folder})")
            return folder
    raise UserError(
        f"{name}: no {SAFETENSORS}, {FLAX} or {TORCH} on the hub or, while it is offline, "
        f"in its cache ({folder})"
    )


def _may_be_flax(folder: Path) -> bool:
    """Returns whether a model may have Flax weights: a T5, or one of yet unknown type."""
    try:
        return is_t5(model_type_of(folder))
    except UserError:  # opening the model reports it
        return True


def _patterns(weights: str) -> list[str]:
    stem, _, suffix = weights.rpartition(".")
    return [weights, weights + INDEX_SUFFIX, f"{stem}-*-of-*.{suffix}"]


def _snapshot(name: str, patterns: list[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )
    except ImportError:
        raise UserError(
            f"there is no folder {name}; to fetch it from the Hugging Face hub, install "
            "huggingface_hub (pip install huggingface_hub)"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except GatedRepoError as error:
        raise UserError(
            f"{name}: accept its license on huggingface.co first, then log in (hf auth login)"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{name}: neither a folder nor a public model on huggingface.co; "
            "check the name, or log in for a private model (hf auth login)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{name}: not complete in the hub's cache, and huggingface.co cannot be reached or "
            "HF_HUB_OFFLINE is set; go online once, or name a folder"
        ) from error
    # HTTP and file system errors are OSErrors; the network library raises others.
    except Exception as error:
        line = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"{name}: fetching it from huggingface.co failed: {line}") from error


def fetch_folder(address: str, choose: Callable[[Iterable[str]], list[str]]) -> Path:
    """Returns a local copy of the files that ``choose`` selects from a folder in a bucket.

    The copy is in ``$XDG_CACHE_HOME/prompt_tuning_jax/models`` (default ``~/.cache``), and only
    files that have changed are fetched again.  Raises UserError.
    """
    bucket = Bucket(address)
    key = hashlib.sha256(bucket.address.encode()).hexdigest()[:16]
    folder = user_cache("models") / key
    wanted = choose(bucket.names())
    known = _generations(folder)
    with progress(f"fetching {bucket.address}") as report:
        for name in wanted:
            generation = known.get(name)
            there = generation and (folder / name).is_file()
            if there and not bucket.has_changed(name, known[name]):
                continue
            known[name] = bucket.fetch(name, folder / name, report=report)
            with atomic_write(folder / _GENERATIONS) as temporary:
                temporary.write_text(json_text(known), encoding="utf-8")
    # Files that the bucket no longer has must not be used.
    for file in folder.glob("*"):
        if file.name not in wanted and not file.name.startswith("."):
            file.unlink(missing_ok=True)
    return folder


def _generations(folder: Path) -> dict[str, str]:
    try:
        known = read_json_file(folder / _GENERATIONS)
        return {str(name): bytes.fromhex(value).hex() for name, value in known.items()}
    except (UserError, ValueError, AttributeError, TypeError):
        return {}
