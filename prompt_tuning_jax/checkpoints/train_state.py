"""The state of a training run on disk, saved with Orbax: atomically, and safe against being killed.

``folder`` has one subfolder per saved step; the last two are kept unless told otherwise.  A save is
written to a temporary folder and renamed when it is complete.  Readers never see a save that a kill
interrupted, and the next save removes it.  Each save carries a digest of all its arrays, which is
compared when they are read: if the newest step is damaged, the one before it is used, with a
warning.
"""

import functools
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from prompt_tuning_jax.distributed.sharding import on_host
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.untrusted_input import json_text, require_whole

# Folders of states in a run's folder: the one to resume from, and the best of each member.
LAST, BEST = "checkpoints/last", "checkpoints/best"

_STATE = "state"  # Orbax's name for the item of a step

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

    Keeps the last ``keep`` steps and removes older ones afterwards.  Returns False without writing
    if the step exists, because a run's state is a pure function of its step.  Numbers in ``extra``
    that are not finite become null.  Arrays may be sharded; all processes must call.  Raises
    UserError if the folder cannot be written or has a later step.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; at least one step must be kept")
    # Also raises a clearer TypeError than Orbax's threads would.
    extra = json.loads(json_text(extra))
    leaves = {name: _savable(leaf) for name, leaf in _named_leaves(state).items()}
    with _checkpointer(folder, keep=keep) as checkpointer:
        latest = checkpointer.latest
        if latest is not None and latest.step >= step:
            if any(saved.step == step for saved in checkpointer.checkpoints):
                return False
            raise UserError(
                f"{folder} has step {latest.step}, which is later than {step}: "
                "resume from it, or use an empty folder"
            )
        metadata = {"extra": extra, "sha256": _digest(leaves, extra)}
        checkpointer.save(step, leaves, force=True, custom_metadata=metadata)
    return True


def restore_latest(
    folder: str | Path, like: Tree, *, advice: str = ""
) -> tuple[int, Tree, dict[str, Any]] | None:
    """Returns the last intact save as (step, state, extra); None if nothing was saved.

    ``like`` is a tree of arrays or ``jax.ShapeDtypeStruct``.  The result has its structure and
    shardings (jax arrays for jax leaves, numpy arrays for others), bit for bit as saved.  If the
    newest save is damaged, the one before it is used, with a warning.  Raises UserError that ends
    with ``advice`` if all saves are damaged, and UserError that names the first leaf whose path,
    shape or dtype differs from the save.  Only reads, so another process may be training.
    """
    wanted = _named_leaves(like)

    def abstract(saved: Mapping[str, Any], where: Path) -> dict[str, Any]:
        _require_same(saved, wanted, where=where)
        return {name: _abstract(leaf) for name, leaf in wanted.items()}

    latest = _load_latest(folder, abstract, advice=advice)
    if latest is None:
        return None
    step, leaves, extra = latest
    state = jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in wanted])
    return step, state, extra


def read_latest(
    folder: str | Path, *, advice: str = ""
) -> tuple[int, dict[str, np.ndarray], dict[str, Any]] | None:
    """Like ``restore_latest``, but returns (step, host arrays by path, extra)."""
    return _load_latest(
        folder,
        lambda saved, _: {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in saved.items()},
        advice=advice,
    )


def latest_step(folder: str | Path) -> int:
    """Returns the newest saved step, intact or not; 0 if there is none."""
    return max(_steps(Path(folder)), default=0)


def remove_damaged(folder: str | Path, *, restored: int) -> None:
    """Removes saves that are later than the restored one, which must be damaged.

    Also removes earlier ones with unreadable metadata, because Orbax cannot save beside them.
    Raises UserError if that fails.
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
    """Returns the steps with a folder of the final name, newest first."""
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
    """Returns (step, arrays by path, extra) of the last intact save.

    ``abstract`` maps the metadata of a save, and its path, to the abstract arrays to restore.
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
                "%s: damaged: %s; using the save before, of step %d", folder, damaged, step
            )
        return step, leaves, extra
    if not reasons:
        return None
    newest = next(iter(reasons.values()))
    if isinstance(newest, _OtherRunError):
        raise newest
    before = f", and so are earlier saves (back to step {min(reasons)})" if len(reasons) > 1 else ""
    raise UserError(
        f"the training state {Path(folder) / str(max(reasons))} is damaged ({newest}){before}"
        + (f": {advice}" if advice else "")
    )


def _load_step(
    folder: str | Path, step: int, abstract: Callable[[Mapping[str, Any], Path], dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns one step's arrays by path, and extra; a short UserError if it is damaged."""
    from orbax.checkpoint import v1 as ocp

    where = Path(folder).absolute() / str(step)
    require_whole(where)
    # Not with the folder's Checkpointer, which reads all steps and fails if any is damaged.
    with _reporting():
        saved = ocp.metadata(where, _STATE)
        custom = saved.custom_metadata
        if not isinstance(custom, Mapping) or not isinstance(custom.get("extra"), dict):
            raise UserError("its metadata is missing or truncated")
        if not isinstance(saved.metadata, Mapping):
            raise UserError("it has no description of its arrays")
        wanted = abstract(saved.metadata, Path(folder) / str(step))
        leaves = dict(ocp.load(where, wanted, checkpointable_name=_STATE))
        extra = custom["extra"]
        if custom.get("sha256") != _digest(leaves, extra):
            raise UserError("its arrays have changed since they were saved: the digest differs")
    return leaves, extra


def _digest(leaves: Mapping[str, Any], extra: Mapping[str, Any]) -> str:
    """Returns a digest of the arrays' bytes, names, dtypes and shapes, and of ``extra``."""
    digest = hashlib.sha256(json_text(extra, sort_keys=True).encode())
    for name in sorted(leaves):
        array = np.asarray(on_host(leaves[name]))
        digest.update(f"\0{name} {array.dtype.name} {list(array.shape)}\0".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


@contextmanager
def _checkpointer(folder: str | Path, *, keep: int) -> Iterator[Any]:
    """Orbax's checkpointer for writing, without its log, and with one-line errors."""
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
    """Silences Orbax's log, and turns its errors into UserErrors of one line."""
    from absl import logging as absl_logging

    verbosity = absl_logging.get_verbosity()
    # Orbax's threads log errors that it also raises.
    absl_logging.set_verbosity(absl_logging.FATAL)
    silence_orbax()
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many types
        raise UserError(f"{beginning}{_line(error)}") from None
    finally:
        absl_logging.set_verbosity(verbosity)


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path, in the tree's order, so that the stored form is independent of containers."""
    flat = jax.tree.leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}
    if len(named) != len(flat):
        raise ValueError("two leaves of the training state have the same path")
    return named


class _OtherRunError(UserError):
    """A save has other arrays than the ones to restore."""


def _savable(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _abstract(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return np.asarray(leaf)
    # Without a sharding Orbax uses the stored one, whose devices may not exist here.
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _require_same(saved: Mapping[str, Any], wanted: Mapping[str, Any], *, where: Path) -> None:
    for name in [*wanted, *sorted(saved.keys() - wanted.keys())]:
        there, here = (_kind(tree[name]) if name in tree else None for tree in (saved, wanted))
        if there != here:
            raise _OtherRunError(
                f"{where} is the state of a different run: {name} is {there or 'absent'} there "
                f"and {here or 'absent'} here; use its config, or an empty folder"
            )


def _kind(leaf: Any) -> str:
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _line(error: BaseException) -> str:
    while error.__cause__ is not None:  # Orbax wraps errors of the file system
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f" ({error.filename})" if error.filename else "")
    if match := re.search(r"os_error_code='(\d+)'", str(error)):  # TensorStore's messages are long
        return os.strerror(int(match[1]))
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return (str(error) or type(error).__name__).splitlines()[0][:200]


_IN_LOGS = (
    ("asyncio", "Task exception was never retrieved"),
    ("asyncio", "Future exception was never retrieved"),
    ("absl", "_SignalingThread.run() raised an exception"),
    ("", "TensorStore data files not found in checkpoint path"),
)


@functools.cache
def silence_orbax() -> None:
    """Filters these reports, and no others, from now on; they may come after Orbax returns."""
    for name, beginning in _IN_LOGS:
        logging.getLogger(name or None).addFilter(functools.partial(_passes, beginning=beginning))
    warnings.filterwarnings(
        "ignore", "coroutine '_read_array_index_and_device_put' was never awaited", RuntimeWarning
    )
    report = sys.unraisablehook

    def unraisablehook(unraisable: "sys.UnraisableHookArgs") -> None:
        if not _is_late_callback(unraisable):
            report(unraisable)

    sys.unraisablehook = unraisablehook


def _passes(record: logging.LogRecord, *, beginning: str) -> bool:
    return beginning not in record.getMessage()


def _is_late_callback(unraisable: "sys.UnraisableHookArgs") -> bool:
    """Returns whether TensorStore called into a closed event loop, or Orbax left a coroutine."""
    code = getattr(unraisable.object, "cr_code", None)
    if code is not None:
        return "orbax" in Path(code.co_filename).parts
    return unraisable.object is None and str(unraisable.exc_value) == "Event loop is closed"
