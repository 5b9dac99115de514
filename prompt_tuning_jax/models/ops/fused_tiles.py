"""How the attention kernel divides the scores of a head, and which tiles it skips.

Scores are computed for a block of queries and a tile of keys at a time.  A tile in which no query
of the block sees a key, by causal mask, window or padding, is not computed.
"""

from dataclasses import dataclass, field
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.models.ops.attention import MASK_VALUE
from prompt_tuning_jax.typing import Array, DType

LANES = 128
# A smaller block of queries would be filled up to a multiple of LANES for nothing.
FEWEST_QUERIES = 64
# All keys and values of a head are in a chip's fast memory at once.
_MOST_KEYS = 2048
_MOST_KEY_BYTES = 2048 * 256  # of all keys of a head, at least LANES numbers each
_MOST_KEYS_OF_MAPS = 1024  # an array of all queries and keys is there, too
_MOST_SCORES = 640 * 640  # of a block without tiles, in float32: there are a few such arrays
_LARGEST_BLOCK, _LARGEST_TILE = 256, 256


def fits(queries: int, keys: int, *, width: int, dtype: DType, maps: bool) -> bool:
    """Returns whether the kernel is for so many positions; see ``most_keys``."""
    most = most_keys(width=width, dtype=dtype, maps=maps)
    return queries >= FEWEST_QUERIES and max(queries, keys) <= most


def most_keys(*, width: int, dtype: DType, maps: bool) -> int:
    """Returns the most positions that heads of this width can attend to in the kernel.

    ``maps`` says whether there is a bias, or factors for dropout, for all queries and keys.
    """
    most = min(_MOST_KEYS, _MOST_KEY_BYTES // (max(width, LANES) * jnp.dtype(dtype).itemsize))
    return min(most, _MOST_KEYS_OF_MAPS) if maps else most


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """The division of the scores of a head, ``length`` queries and ``keys`` keys.

    Attributes:
      block: the queries of a block.
      tile: the keys of a tile; all of them if no tile can be skipped.
      window: how many positions up to its own a query sees; 0 is all.
      ahead: how many later positions it sees; None is all.
    """

    length: int
    keys: int
    block: int
    tile: int
    window: int = 0
    ahead: int | None = None

    @property
    def blocks(self) -> int:
        return _padded(self.length) // self.block

    @property
    def tiles(self) -> int:
        return _padded(self.keys) // self.tile

    @property
    def padded_length(self) -> int:
        return self.blocks * self.block

    @property
    def padded_keys(self) -> int:
        return self.tiles * self.tile

    def visited(self) -> int:
        """Counts the tiles of all blocks that are computed in a row without padding.

        The last query is at the position of the last key.
        """
        query_T1 = np.arange(self.padded_length)[:, None]
        query_T1 = np.minimum(query_T1, self.length - 1) + self.keys - self.length
        key_U = np.arange(self.padded_keys)
        seen_TU = np.broadcast_to(key_U < self.keys, (self.padded_length, self.padded_keys))
        if self.ahead is not None:
            seen_TU = seen_TU & (query_T1 - key_U >= -self.ahead)
        if self.window:
            seen_TU = seen_TU & (query_T1 - key_U < self.window)
        return int(np.sum(self._by_tile(seen_TU).any(axis=(-3, -1))))

    def _by_tile(self, x_TU: np.ndarray) -> np.ndarray:
        return x_TU.reshape(self.blocks, self.block, self.tiles, self.tile)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Visibility:
    """Which keys each query sees, as the kernel reads it.

    Attributes:
      mask_B1U: added to scores: 0, ``MASK_VALUE`` for a masked key, and twice that for a key that
        only fills the last tile.
      query_position_B1T: positions in float32; None if queries see all keys that are real.
      key_position_B1U: likewise.
      tiles_B1I: for each block the tiles that it needs, as bits.
      tiling: the division of the scores.
    """

    mask_B1U: Array
    query_position_B1T: Array | None
    key_position_B1U: Array | None
    tiles_B1I: Array
    tiling: Tiling = field(metadata={"static": True})


def visible_keys(mask_BU: Array, *, length: int) -> Visibility:
    """Makes all keys of ``mask_BU`` visible to each of ``length`` queries."""
    keys = mask_BU.shape[1]
    tiling = Tiling(
        length=length, keys=keys, block=_largest_block(length, keys), tile=_padded(keys)
    )
    return Visibility(
        mask_B1U=_additive(mask_BU, tiling),
        query_position_B1T=None,
        key_position_B1U=None,
        tiles_B1I=jnp.ones((len(mask_BU), 1, tiling.blocks), jnp.int32),
        tiling=tiling,
    )


def visible_positions(
    query_position_BT: Array,
    key_position_BU: Array,
    *,
    mask_BU: Array,
    window: int = 0,
    ahead: int | None = 0,
) -> Visibility:
    """Makes keys visible by their positions, as ``causal_lm.attention.attention_bias`` does.

    Positions have a batch of 1 or B; ``mask_BU`` has B.
    """
    length, keys = query_position_BT.shape[1], key_position_BU.shape[1]
    tiling = Tiling(
        length=length,
        keys=keys,
        block=_largest(_LARGEST_BLOCK, _padded(length)),
        tile=_largest(_LARGEST_TILE, _padded(keys)),
        window=window,
        ahead=ahead,
    )
    batch, more, more_keys = (
        len(mask_BU),
        tiling.padded_length - length,
        tiling.padded_keys - keys,
    )
    # What fills the last block sees what the last query sees.
    query_BT = jnp.pad(query_position_BT.astype(jnp.float32), ((0, 0), (0, more)), mode="edge")
    key_BU = jnp.pad(key_position_BU.astype(jnp.float32), ((0, 0), (0, more_keys)))
    distance_BTU = query_BT[:, :, None] - key_BU[:, None, :]
    seen = [jnp.pad(mask_BU, ((0, 0), (0, more_keys)))[:, None, :]]
    if ahead is not None:
        seen.append(distance_BTU >= -ahead)
    if window:
        seen.append(distance_BTU < window)
    seen_BTU = reduce(jnp.logical_and, seen)
    shape = (batch, tiling.blocks, tiling.block, tiling.tiles, tiling.tile)
    seen_BTU = jnp.broadcast_to(seen_BTU, (batch, *distance_BTU.shape[1:]))
    needed_BIJ = jnp.any(seen_BTU.reshape(shape), axis=(2, 4))
    # A query that sees no key gets the mean of all values, and so needs all tiles.
    blind_BI = ~jnp.all(jnp.any(seen_BTU, axis=2).reshape(shape[:3]), axis=2)
    needed_BIJ = needed_BIJ | blind_BI[..., None]
    tiles_BI = jnp.sum(needed_BIJ << np.arange(tiling.tiles), axis=-1, dtype=jnp.int32)

    def of_rows(x_BN: Array) -> Array:
        return jnp.broadcast_to(x_BN, (batch, x_BN.shape[1]))[:, None]

    return Visibility(
        mask_B1U=_additive(mask_BU, tiling),
        query_position_B1T=of_rows(query_BT),
        key_position_B1U=of_rows(key_BU),
        tiles_B1I=tiles_BI[:, None],
        tiling=tiling,
    )


def _additive(mask_BU: Array, tiling: Tiling) -> Array:
    mask_BU = jnp.where(mask_BU, 0.0, MASK_VALUE).astype(jnp.float32)
    # Keys that do not exist weigh nothing, even for a query that sees no key at all.
    more = ((0, 0), (0, tiling.padded_keys - tiling.keys))
    return jnp.pad(mask_BU, more, constant_values=2 * MASK_VALUE)[:, None]


def _padded(number: int) -> int:
    return -(-number // LANES) * LANES


def _largest(most: int, length: int) -> int:
    """Returns the largest multiple of LANES up to ``most`` that divides ``length``."""
    return next(n for n in range(most, 0, -LANES) if length % n == 0)


def _largest_block(length: int, keys: int) -> int:
    """Returns the queries of a block whose scores fit at once."""
    fitting = max(_MOST_SCORES // _padded(keys) // LANES, 1) * LANES
    return _largest(fitting, _padded(length))
