"""Where a model is: bundled, published under a name, on this machine or in a bucket."""

import logging
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from prompt_tuning_jax.checkpoints.bucket import fetch_folder, is_address, store_of
from prompt_tuning_jax.checkpoints.hf.config import CONFIG, GENERATION_CONFIG
from prompt_tuning_jax.checkpoints.hf.weights import FLAX, INDEX_SUFFIX, SAFETENSORS, TORCH
from prompt_tuning_jax.checkpoints.t5x.reader import is_t5x
from prompt_tuning_jax.config.paths import BUNDLED, T5X_MODELS
from prompt_tuning_jax.data.vocabularies.hf_tokenizer import TOKENIZER_FILES
from prompt_tuning_jax.errors import UserError, suggest

_log = logging.getLogger(__name__)

ASSETS = Path(__file__).parent.parent / "assets"
# The one that all of these were trained with: 32,000 pieces, and 100 sentinels.
T5X_VOCABULARY = "gs://t5-data/vocabs/cc_all.32000.100extra"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_CHECKPOINT = re.compile(r"checkpoint_(\d+)")
_DESCRIPTION = (CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES)


def model_location(name: str) -> str:
    """The folder, or the ``gs://`` or ``s3://`` address, of a model by its name.

    ``tiny`` is bundled; ``t5_1_1_lm100k_base`` and the other sizes are T5X checkpoints in a public
    bucket; a folder and an address are what they are, and of a folder of ``checkpoint_<step>`` the
    last is; ``google/flan-t5-small`` or any other ``org/name`` is fetched from the Hugging Face
    hub, or found in its cache.  Raises UserError.
    """
    if name in BUNDLED:
        return str(ASSETS / name)
    if name in T5X_MODELS:
        return T5X_MODELS[name]
    if is_address(name):
        if store_of(name) is None:
            raise UserError(f"{name}: models are read at gs:// and s3://BUCKET/PATH alone")
        return name
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(_newest_checkpoint(folder) or folder)
    if is_hub_name(name):
        last = name.rpartition("/")[2]
        if last in (*BUNDLED, *T5X_MODELS):
            raise UserError(f"there is no folder {name}; did you mean {last}, without the folder?")
        return str(hub_folder(name))
    raise UserError(
        f"model {name!r} is neither a folder nor a bundled model; "
        f"{suggest(name, [*BUNDLED, *T5X_MODELS])}, and org/name of the Hugging Face hub"
    )


def _newest_checkpoint(folder: Path) -> Path | None:
    """The latest of T5X's ``checkpoint_<step>`` in a folder that is no model itself."""
    if (folder / CONFIG).exists() or is_t5x(folder):
        return None
    steps = {
        int(found[1]): child
        for child in folder.iterdir()
        if (found := _CHECKPOINT.fullmatch(child.name)) and child.is_dir()
    }
    if not steps:
        return None
    if len(steps) > 1:
        listed = ", ".join(map(str, sorted(steps)))
        _log.warning("%s holds checkpoints of steps %s: the last is used", folder, listed)
    return steps[max(steps)]


def hf_folder(location: str) -> Path:
    """The folder on this machine of a Hugging Face model at a location of ``model_location``.

    One in a bucket is copied first, see ``bucket.fetch_folder``; only what a hub would send.
    """
    if not is_address(location):
        return Path(location)

    def choose(there: Iterable[str]) -> list[str]:
        files = list(there)
        for weights in (SAFETENSORS, FLAX, TORCH):
            chosen = _matching(files, [*_DESCRIPTION, *_patterns(weights)])
            if CONFIG in chosen and {weights, weights + INDEX_SUFFIX} & set(chosen):
                # The shards of some other model may lie beside the one file.
                single = weights in chosen
                return [f for f in chosen if not (single and f in _shards(files, weights))]
        raise UserError(
            f"{location} holds no model: neither a T5X checkpoint (checkpoint, or state/_METADATA) "
            f"nor a Hugging Face folder ({CONFIG} and weights)"
        )

    return fetch_folder(location, choose)


def _shards(files: Iterable[str], weights: str) -> list[str]:
    return _matching(files, _patterns(weights)[1:])


def _matching(files: Iterable[str], patterns: Iterable[str]) -> list[str]:
    wanted = list(patterns)
    return [file for file in files if any(fnmatchcase(file, pattern) for pattern in wanted)]


def t5x_vocabulary(name: str) -> Path | None:
    """The vocabulary of a published T5X checkpoint, None where ``name`` is none or another's."""
    if name not in T5X_MODELS and name.rstrip("/") not in T5X_MODELS.values():
        return None
    file = "sentencepiece.model"
    folder = fetch_folder(T5X_VOCABULARY, lambda there: [f for f in there if f == file])
    if not (folder / file).is_file():
        raise UserError(f"{T5X_VOCABULARY} has no {file}: give the vocabulary (model.vocabulary)")
    return folder / file


def is_hub_name(name: str) -> bool:
    """Whether a name has the form ``org/name``."""
    return _HUB_NAME.fullmatch(name) is not None


def hub_folder(name: str) -> Path:
    """The local folder of a model on the Hugging Face hub, fetched unless its cache has it.

    Only what is read here is fetched: the configuration, the vocabulary, and the weights in the
    first format there is of safetensors, Flax and torch.  ``HF_HOME``, ``HF_HUB_OFFLINE`` and the
    hub's token hold.  Raises UserError.
    """
    folder = Path(name)
    for weights in (SAFETENSORS, FLAX, TORCH):
        folder = _snapshot(name, [*_DESCRIPTION, *_patterns(weights)])
        if (folder / weights).is_file() or (folder / (weights + INDEX_SUFFIX)).is_file():
            if not (folder / CONFIG).is_file():
                raise UserError(f"{name}: no {CONFIG} on the hub or in its cache ({folder})")
            return folder
    raise UserError(
        f"{name}: no {SAFETENSORS}, {FLAX} or {TORCH} on the hub or, while it is offline, "
        f"in its cache ({folder})"
    )


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
            f"there is no folder {name}; as a model of the Hugging Face hub it needs "
            "huggingface_hub (pip install huggingface_hub)"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except GatedRepoError as error:
        raise UserError(
            f"{name}: its licence must be accepted on huggingface.co first; then log in (hf auth "
            "login)"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{name}: neither a folder nor a model on huggingface.co, or a private one; "
            "check the name, or log in (hf auth login)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{name}: not wholly in the hub's cache, and huggingface.co cannot be reached or "
            "HF_HUB_OFFLINE is set; go online once, or give a folder"
        ) from error
    # Its errors of HTTP and of the file system are OSErrors; others are the network library's.
    except Exception as error:
        line = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"{name}: fetching it from huggingface.co failed: {line}") from error
