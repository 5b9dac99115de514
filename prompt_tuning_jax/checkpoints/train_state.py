"""The state of a training run on disk, by orbax: small, atomic, and safe against being killed.

``folder`` holds one folder per saved step.  A save is written aside and renamed when it is whole; a
save that a kill left behind is never seen by a reader, and the next save removes it.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from prompt_tuning_jax.errors import UserError

# Where in a run's folder its states are: the one to go on from, and the best of each member.
LAST, BEST = "checkpoints/last", "checkpoints/best"

Tree = TypeVar("Tree")


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
    Sharded arrays are fine; with several processes all of them must call.  Raises UserError if the
    folder cannot be written or holds a later step.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; at least the last step must stay")
    json.dumps(extra)  # a TypeError here is clearer than one from orbax's threads
    leaves = {name: _savable(leaf) for name, leaf in _named_leaves(state).items()}
    with _checkpointer(folder, keep=keep, writing=True) as checkpointer:
        latest = checkpointer.latest
        if latest is not None and latest.step >= step:
            if any(saved.step == step for saved in checkpointer.checkpoints):
                return False
            raise UserError(
                f"{folder} holds step {latest.step}, later than {step}: "
                "go on from there, or use an empty folder"
            )
        checkpointer.save(step, leaves, force=True, custom_metadata={"extra": dict(extra)})
    return True


def restore_latest(folder: str | Path, like: Tree) -> tuple[int, Tree, dict[str, Any]] | None:
    """The last whole save as (step, state, extra), or None if there is none.

    ``like`` is a tree of arrays or ``jax.ShapeDtypeStruct``: the result has its structure and
    shardings (jax arrays for jax leaves, numpy for the others), bit for bit as saved.  Raises
    UserError that names the first leaf whose path, shape or dtype differs from what was saved.
    Only reads, so it may be called while another process trains.
    """
    wanted = _named_leaves(like)

    def abstract(saved: Mapping[str, Any], where: Path) -> dict[str, Any]:
        _require_same(saved, wanted, where=where)
        return {name: _abstract(leaf) for name, leaf in wanted.items()}

    found = _load_latest(folder, abstract)
    if found is None:
        return None
    step, leaves, extra = found
    state = jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in wanted])
    return step, state, extra


def read_latest(folder: str | Path) -> tuple[int, dict[str, np.ndarray], dict[str, Any]] | None:
    """The last whole save as (step, host arrays by path, extra), or None if there is none."""
    return _load_latest(
        folder,
        lambda saved, _: {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in saved.items()},
    )


def _load_latest(
    folder: str | Path, abstract: Callable[[Mapping[str, Any], Path], dict[str, Any]]
) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
    """The last whole save's (step, arrays by path, extra).

    ``abstract`` says from what was saved (and where) how each array is wanted.
    """
    if not Path(folder).is_dir():
        return None
    with _checkpointer(folder, keep=None, writing=False) as checkpointer:
        latest = checkpointer.latest
        if latest is None:
            return None
        saved = checkpointer.metadata(latest)
        if saved.metadata is None:
            raise ValueError(f"step {latest.step} has no description of its arrays")
        wanted = abstract(saved.metadata, Path(folder) / str(latest.step))
        leaves = checkpointer.load(latest, wanted)
        extra = saved.custom_metadata["extra"]
    return latest.step, dict(leaves), extra


@contextmanager
def _checkpointer(folder: str | Path, *, keep: int | None, writing: bool) -> Iterator[Any]:
    """Orbax's checkpointer, silent, and with one-line errors for what is wrong with the folder."""
    from absl import logging
    from orbax.checkpoint import v1 as ocp

    policies = ocp.training.preservation_policies
    verbosity = logging.get_verbosity()
    # Orbax logs from its threads what it also raises.
    logging.set_verbosity(logging.FATAL)
    try:
        with ocp.training.Checkpointer(
            Path(folder).absolute(),
            preservation_policy=policies.LatestN(keep) if keep else policies.PreserveAll(),
            # A reader must not take away what a running save has not finished.
            cleanup_tmp_directories=writing,
        ) as checkpointer:
            yield checkpointer
    except UserError:
        raise
    except Exception as error:  # orbax and TensorStore raise many kinds for broken files
        raise UserError(
            f"cannot write the training state to {folder}: {_line(error)}"
            if writing
            else f"the training state in {folder} is damaged ({_line(error)}): "
            "remove its last step to go on from the one before"
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path, in the tree's order: what is stored does not depend on container types."""
    flat = jax.tree.leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}
    if len(named) != len(flat):
        raise ValueError("two leaves of the training state have the same path")
    return named


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
            raise UserError(
                f"{where} holds the state of a different run: {name} is {there or 'absent'} there "
                f"and {here or 'absent'} here; use its config, or an empty folder"
            )


def _kind(leaf: Any) -> str:
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _line(error: BaseException) -> str:
    while error.__cause__ is not None:  # orbax wraps what the file system says
        error = error.__cause__
    return (str(error) or type(error).__name__).splitlines()[0][:200]
