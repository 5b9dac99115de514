"""The state of a training run on disk, by orbax: small, atomic, and safe against being killed.

``folder`` holds one folder per saved step, the last two unless told otherwise.  A save is written
aside and renamed when it is whole; a save that a kill left behind is never seen by a reader, and
the next save removes it.  A digest over all arrays is saved with them and compared when they are
read: where the newest step is damaged, the one before it is used, and a warning says so.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from prompt_tuning_jax.checkpoints.orbax_noise import silence_orbax
from prompt_tuning_jax.distributed.sharding import on_host
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.untrusted_input import json_text, require_whole

# Where in a run's folder its states are: the one to go on from, and the best of each member.
LAST, BEST = "checkpoints/last", "checkpoints/best"

_STATE = "state"  # orbax's own name of what a step holds

Tree = TypeVar("Tree")

_log = logging.getLogger(__name__)


def save(
    folder: str | Path,
    step: int,
    state: Any,
    extra: Mapping[str, Any],
    *,
    keep: int = 2,
) -> bool:
    """Writes a tree of arrays and a JSON-able dict, and returns when both are safely on disk.

    The last ``keep`` steps stay, older ones are removed afterwards.  A step that is saved already
    is left as it is, for a run's state is a pure function of its step; the result is then False.
    What is not finite in ``extra`` becomes null.  Sharded arrays are fine; with several processes
    all of them must call.  Raises UserError if the folder cannot be written or holds a later step.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; at least the last step must stay")
    # Also for a TypeError that is clearer than one from orbax's threads.
    extra = json.loads(json_text(extra))
    leaves = {name: _savable(leaf) for name, leaf in _named_leaves(state).items()}
    with _checkpointer(folder, keep=keep) as checkpointer:
        latest = checkpointer.latest
        if latest is not None and latest.step >= step:
            if any(saved.step == step for saved in checkpointer.checkpoints):
                return False
            raise UserError(
                f"{folder} holds step {latest.step}, later than {step}: "
                "go on from there, or use an empty folder"
            )
        metadata = {"extra": extra, "sha256": _digest(leaves, extra)}
        checkpointer.save(step, leaves, force=True, custom_metadata=metadata)
    return True


def restore_latest(
    folder: str | Path, like: Tree, *, advice: str = ""
) -> tuple[int, Tree, dict[str, Any]] | None:
    """The last whole save as (step, state, extra), or None if there is none.

    ``like`` is a tree of arrays or ``jax.ShapeDtypeStruct``: the result has its structure and
    shardings (jax arrays for jax leaves, numpy for the others), bit for bit as saved.  Where the
    newest save is damaged the one before is used, with a warning.  Raises UserError where none is
    whole, followed by ``advice``, and one that names the first leaf whose path, shape or dtype
    differs from what was saved.  Only reads, so it may be called while another process trains.
    """
    wanted = _named_leaves(like)

    def abstract(saved: Mapping[str, Any], where: Path) -> dict[str, Any]:
        _require_same(saved, wanted, where=where)
        return {name: _abstract(leaf) for name, leaf in wanted.items()}

    found = _load_latest(folder, abstract, advice=advice)
    if found is None:
        return None
    step, leaves, extra = found
    state = jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in wanted])
    return step, state, extra


def read_latest(
    folder: str | Path, *, advice: str = ""
) -> tuple[int, dict[str, np.ndarray], dict[str, Any]] | None:
    """The last whole save as (step, host arrays by path, extra), or None; as ``restore_latest``."""
    return _load_latest(
        folder,
        lambda saved, _: {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in saved.items()},
        advice=advice,
    )


def latest_step(folder: str | Path) -> int:
    """The newest step that was saved, whole or not; 0 if there is none."""
    return max(_steps(Path(folder)), default=0)


def remove_damaged(folder: str | Path, *, restored: int) -> None:
    """Removes the saves of later steps than what was restored, which are damaged then.

    Of earlier ones, those whose metadata cannot be read: nothing could be saved beside them.
    Raises UserError where that cannot be done.
    """
    for step in _steps(Path(folder)):
        if step > restored or (step < restored and not _has_metadata(folder, step)):
            try:
                shutil.rmtree(Path(folder) / str(step))
            except OSError as error:
                raise UserError(
                    f"cannot remove the damaged step {Path(folder) / str(step)}: "
                    f"{error.strerror or error}"
                ) from None


def _has_metadata(folder: str | Path, step: int) -> bool:
    from orbax.checkpoint import v1 as ocp

    try:
        with _reporting():
            ocp.metadata(Path(folder).absolute() / str(step), _STATE)
    except UserError:
        return False
    return True


def _steps(folder: Path) -> list[int]:
    """Steps that have a folder of their final name, the newest first."""
    try:
        names = [path.name for path in folder.iterdir() if path.is_dir()]
    except OSError:
        return []
    return sorted((int(name) for name in names if name.isascii() and name.isdigit()), reverse=True)


def _load_latest(
    folder: str | Path,
    abstract: Callable[[Mapping[str, Any], Path], dict[str, Any]],
    *,
    advice: str,
) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
    """The last whole save's (step, arrays by path, extra).

    ``abstract`` says from what was saved (and where) how each array is wanted.
    """
    reasons: dict[int, UserError] = {}
    for step in _steps(Path(folder)):
        try:
            leaves, extra = _load_step(folder, step, abstract)
        except UserError as error:
            reasons[step] = error
            continue
        if reasons:
            damaged = ", ".join(f"step {number} ({error})" for number, error in reasons.items())
            _log.warning(
                "%s: damaged: %s; the one before is used, of step %d", folder, damaged, step
            )
        return step, leaves, extra
    if not reasons:
        return None
    newest = next(iter(reasons.values()))
    if isinstance(newest, _OtherRunError):
        raise newest
    before = f", and so is what was saved before it ({min(reasons)})" if len(reasons) > 1 else ""
    raise UserError(
        f"the training state {Path(folder) / str(max(reasons))} is damaged ({newest}){before}"
        + (f": {advice}" if advice else "")
    )


def _load_step(
    folder: str | Path, step: int, abstract: Callable[[Mapping[str, Any], Path], dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays by path and extra of one step; UserError, in a few words, where it is damaged."""
    from orbax.checkpoint import v1 as ocp

    where = Path(folder).absolute() / str(step)
    require_whole(where)
    # Not by the folder's checkpointer, which reads all steps and fails for any that is damaged.
    with _reporting():
        saved = ocp.metadata(where, _STATE)
        custom = saved.custom_metadata
        if not isinstance(custom, Mapping) or not isinstance(custom.get("extra"), dict):
            raise UserError("its metadata is missing or cut off")
        if not isinstance(saved.metadata, Mapping):
            raise UserError("it has no description of its arrays")
        wanted = abstract(saved.metadata, Path(folder) / str(step))
        leaves = dict(ocp.load(where, wanted, checkpointable_name=_STATE))
        extra = custom["extra"]
        if custom.get("sha256") != _digest(leaves, extra):
            raise UserError("its arrays are not those that were saved: the digest differs")
    return leaves, extra


def _digest(leaves: Mapping[str, Any], extra: Mapping[str, Any]) -> str:
    """Of all bits of the arrays, of their names, types and shapes, and of what is saved beside."""
    found = hashlib.sha256(json_text(extra, sort_keys=True).encode())
    for name in sorted(leaves):
        array = np.asarray(on_host(leaves[name]))
        found.update(f"\0{name} {array.dtype.name} {list(array.shape)}\0".encode())
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


@contextmanager
def _checkpointer(folder: str | Path, *, keep: int) -> Iterator[Any]:
    """Orbax's checkpointer to write with, silent, and with one-line errors."""
    from orbax.checkpoint import v1 as ocp

    with (
        _reporting(f"cannot write the training state to {folder}: "),
        ocp.training.Checkpointer(
            Path(folder).absolute(),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        ) as checkpointer,
    ):
        yield checkpointer


@contextmanager
def _reporting(beginning: str = "") -> Iterator[None]:
    """Within, orbax is silent, and its errors become UserErrors of one line."""
    from absl import logging as absl_logging

    verbosity = absl_logging.get_verbosity()
    # Orbax logs from its threads what it also raises.
    absl_logging.set_verbosity(absl_logging.FATAL)
    silence_orbax()
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # orbax and TensorStore raise many kinds for broken files
        raise UserError(f"{beginning}{_line(error)}") from None
    finally:
        absl_logging.set_verbosity(verbosity)


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path, in the tree's order: what is stored does not depend on container types."""
    flat = jax.tree.leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}
    if len(named) != len(flat):
        raise ValueError("two leaves of the training state have the same path")
    return named


class _OtherRunError(UserError):
    """The arrays of a save are others than those that are wanted."""


def _savable(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _abstract(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return np.asarray(leaf)
    # Without a sharding orbax takes the stored one, which may name devices that are not here.
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _require_same(saved: Mapping[str, Any], wanted: Mapping[str, Any], *, where: Path) -> None:
    for name in [*wanted, *sorted(saved.keys() - wanted.keys())]:
        there, here = (_kind(tree[name]) if name in tree else None for tree in (saved, wanted))
        if there != here:
            raise _OtherRunError(
                f"{where} holds the state of a different run: {name} is {there or 'absent'} there "
                f"and {here or 'absent'} here; use its config, or an empty folder"
            )


def _kind(leaf: Any) -> str:
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _line(error: BaseException) -> str:
    while error.__cause__ is not None:  # orbax wraps what the file system says
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f" ({error.filename})" if error.filename else "")
    if found := re.search(r"os_error_code='(\d+)'", str(error)):  # TensorStore's own words are many
        return os.strerror(int(found[1]))
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return (str(error) or type(error).__name__).splitlines()[0][:200]
