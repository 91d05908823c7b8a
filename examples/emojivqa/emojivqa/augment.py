"""Training only: change how cached scenes are drawn, not what they show.

The splits differ in the style of their artwork alone, so each cell gets its own warp, colours,
contrast and sharpness, and sometimes loses a part: what is left to recognise an emoji by is what
other artists keep too. Drawn anew for every batch, on whole batches of tensors.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .scenes import CELL, SIZE

CELLS_A_SIDE = SIZE // CELL
CHANCE = 0.6
ERASED = 0.3
BUMPS = 4


def restyle(pixels: Tensor) -> Tensor:
    """Normalised pixels float [B, 3, SIZE, SIZE], -1 to 1, every cell drawn differently."""
    tiles = _split(pixels)
    for change in (_warp, _recolour, _relight, _sharpen):
        tiles = torch.where(_some(tiles, CHANCE), change(tiles), tiles)
    return _join(torch.where(_some(tiles, ERASED), _erase(tiles), tiles)).clamp(-1.0, 1.0)


def _split(pixels: Tensor) -> Tensor:
    """[B, 3, SIZE, SIZE] to [B * 4, 3, CELL, CELL]."""
    n = CELLS_A_SIDE
    grid = pixels.unflatten(3, (n, CELL)).unflatten(2, (n, CELL))
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, CELL, CELL)


def _join(tiles: Tensor) -> Tensor:
    """What `_split` made, put together again."""
    n = CELLS_A_SIDE
    grid = tiles.reshape(-1, n, n, 3, CELL, CELL)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, SIZE, SIZE)


def _some(tiles: Tensor, chance: float) -> Tensor:
    return torch.rand(len(tiles), 1, 1, 1, device=tiles.device) < chance


def _uniform(tiles: Tensor, low: float, high: float) -> Tensor:
    """One number for each tile, [N, 1, 1, 1]."""
    return torch.empty(len(tiles), 1, 1, 1, device=tiles.device).uniform_(low, high)


def _warp(tiles: Tensor) -> Tensor:
    """Scale, turn and shear, and bend smoothly by about a pixel and a half."""
    change = 0.1 * torch.randn(len(tiles), 2, 3, device=tiles.device)
    straight = torch.eye(2, 3, device=tiles.device) + change * tiles.new_tensor([1.0, 1.0, 0.4])
    grid = F.affine_grid(straight, list(tiles.shape), align_corners=False)
    bumps = torch.randn(len(tiles), 2, BUMPS, BUMPS, device=tiles.device) * (3.0 / CELL)
    bend = F.interpolate(bumps, size=(CELL, CELL), mode="bilinear", align_corners=True)
    where = grid + bend.permute(0, 2, 3, 1)
    return F.grid_sample(tiles, where, padding_mode="border", align_corners=False)


def _recolour(tiles: Tensor) -> Tensor:
    """Turn the hue by some 25 degrees, scale the saturation down to grey; keep the lightness."""
    turn = 0.45 * torch.randn(len(tiles), 1, 1, device=tiles.device)
    saturation = _uniform(tiles, 0.0, 1.6)[:, 0]
    grey = torch.full((3, 3), 1 / 3, device=tiles.device)
    cross = tiles.new_tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    colour = turn.cos() * (torch.eye(3, device=tiles.device) - grey) + turn.sin() * cross
    return torch.einsum("nij,njhw->nihw", grey + saturation * colour, tiles)


def _relight(tiles: Tensor) -> Tensor:
    """Contrast and brightness."""
    mean = tiles.mean((1, 2, 3), keepdim=True)
    lighter = 0.2 * torch.randn(len(tiles), 1, 1, 1, device=tiles.device)
    return mean + _uniform(tiles, 0.5, 1.6) * (tiles - mean) + lighter


def _sharpen(tiles: Tensor) -> Tensor:
    """Add or take away fine detail: blurred at -1, sharper than drawn above 0."""
    blurred = F.avg_pool2d(F.pad(tiles, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return tiles + _uniform(tiles, -1.0, 1.5) * (tiles - blurred)


def _erase(tiles: Tensor) -> Tensor:
    """Fill a rectangle of 6 to 14 pixels a side with the mean colour of its tile."""
    line = torch.arange(CELL, device=tiles.device)
    top, left = _uniform(tiles, 0, CELL - 6), _uniform(tiles, 0, CELL - 6)
    height, width = _uniform(tiles, 6, 14), _uniform(tiles, 6, 14)
    down, across = line[:, None] - top, line[None, :] - left
    inside = (down >= 0) & (down < height) & (across >= 0) & (across < width)
    return torch.where(inside, tiles.mean((2, 3), keepdim=True), tiles)
