"""Tile sizes, by kernel and by what is computed. One readable table instead of a search at run time.

C: tokens a chunk, the granularity of stored states. BD: width of a slice of K or V.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """BD, warps and pipeline stages of one kernel."""

    BD: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """C and the tile of each kernel."""

    C: int
    states: Tile
    outputs: Tile
    values_backward: Tile
    queries_backward: Tile
    states_backward: Tile
    keys_backward: Tile


def choose(dtype: torch.dtype, K: int, V: int, M: int, R: int) -> Tiles:
    """Tiles for heads of width K and V, M slots, R query heads a group."""
    widest = max(16, 1 << (max(K, V) - 1).bit_length())
    half = dtype in (torch.bfloat16, torch.float16)
    narrow, wide = min(64, widest), min(128, widest)
    if dtype == torch.bfloat16 and M <= 64 and R > 1:
        walk, products = Tile(wide, 4, 3), Tile(wide, 4, 2)
        return Tiles(64, walk, products, products, products, walk, products)
    if dtype == torch.bfloat16 and M <= 64:
        walk, products = Tile(wide, 4, 2), Tile(narrow, 8, 3)
        return Tiles(128, walk, products, products, products, walk, products)
    if dtype == torch.bfloat16:
        walk, products = Tile(narrow, 8, 2), Tile(narrow, 8, 2)
        return Tiles(64, walk, products, products, products, walk, products)
    # float32 tiles are twice as large and its exact dots use no tensor cores.
    C = 32 if M > 128 or not half else 64
    small = Tile(min(32, widest), 8 if M > 64 else 4, 1)
    return Tiles(C, small, small, small, small, small, small)
