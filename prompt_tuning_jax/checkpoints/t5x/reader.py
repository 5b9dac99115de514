"""Opens checkpoints that T5X wrote, in each of its layouts, under one set of names."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prompt_tuning_jax.checkpoints.lazy import LazyArray
from prompt_tuning_jax.checkpoints.t5x.config import PROMPT, config_of, is_prompt
from prompt_tuning_jax.checkpoints.t5x.location import Place
from prompt_tuning_jax.checkpoints.t5x.native import INDEX, read_native
from prompt_tuning_jax.checkpoints.t5x.orbax import ITEM, METADATA, read_orbax
from prompt_tuning_jax.checkpoints.t5x.scan import is_scanned, unscanned
from prompt_tuning_jax.checkpoints.t5x.stored import OptimizerState
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.typing import HostArray
from prompt_tuning_jax.untrusted_input import require_whole

__all__ = [
    "INDEX",
    "PROMPT",
    "T5XCheckpoint",
    "config_of",
    "is_prompt",
    "is_t5x",
    "open_t5x",
    "read_t5x",
    "read_t5x_step",
]

Layout = Literal["t5x", "t5x_orbax"]


@dataclass(frozen=True, kw_only=True)
class T5XCheckpoint:
    """An open checkpoint: nothing but its index and headers has been read.

    ``params`` has a layer per name whatever the model was (see ``t5x_scan``); a trained prompt is
    at ``PROMPT``.  ``stored`` has the same arrays under the checkpoint's own names, which with
    ``open_state()`` and ``inline`` are what ``write_t5x`` needs to write it again as it was.
    """

    step: int
    layout: Layout
    version: int
    scanned: bool
    params: dict[str, LazyArray]
    stored: dict[str, LazyArray]
    state_names: tuple[str, ...]
    open_state: Callable[[], OptimizerState]
    inline: frozenset[str]


def is_t5x(folder: str | Path) -> bool:
    """Whether a folder has the index of one of T5X's layouts; UserError for unfinished saves."""
    place = Place.of(folder)
    return place.read(INDEX) is not None or place.read(METADATA) is not None


def open_t5x(folder: str | Path) -> T5XCheckpoint:
    """Opens the checkpoint in a folder, or at a ``gs://`` or ``s3://`` address.

    Raises UserError for what is missing, damaged, unfinished, of another version, or outside of
    the folder; reading from the arrays does so for lost and damaged chunks.
    """
    place = Place.of(folder)
    layout: Layout
    # TensorStore ends the process where the memory for a file cannot be had.
    if place.root is not None:
        require_whole(place.root)
    if (index := place.read(INDEX)) is not None:
        layout, found = "t5x", read_native(place, index)
    elif (metadata := place.read(METADATA)) is not None:
        layout, found = "t5x_orbax", read_orbax(place, metadata)
    else:
        raise UserError(_nothing_in(place))
    return T5XCheckpoint(
        step=found.step,
        layout=layout,
        version=found.version,
        scanned=is_scanned(found.params),
        params=unscanned(found.params),
        stored=found.params,
        state_names=found.state_names,
        open_state=found.open_state,
        inline=found.inline,
    )


def read_t5x(folder: str | Path) -> dict[str, HostArray]:
    """All parameters in a checkpoint by name, as stored: ``open_t5x``, and everything read."""
    return {name: array.whole() for name, array in open_t5x(folder).params.items()}


def read_t5x_step(folder: str | Path) -> int:
    """The training step at which a checkpoint was saved."""
    return open_t5x(folder).step


def _nothing_in(place: Place) -> str:
    none = f"{place.name} has no index file {INDEX!r}"
    if place.root is None:
        return f"{none} and no {METADATA}; is it a T5X checkpoint?"
    if (place.root / ITEM).is_dir():
        return f"{place.name} has no {METADATA}: the copy is incomplete or the layout another"
    inside = sorted(p.name for p in place.root.glob("checkpoint_*"))
    if inside:
        return f"{none}; did you mean {Path(place.name) / inside[-1]}?"
    if any(place.root.glob("target.*")) or any(place.root.glob(f"{ITEM}.orbax-checkpoint-tmp*")):
        return f"{none}, which is written last: the save was not finished or the copy is incomplete"
    return f"{none}; is it a T5X checkpoint?"
