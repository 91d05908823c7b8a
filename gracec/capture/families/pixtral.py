"""The tower of Pixtral: images of any size, padded to one size, and their patches in one sequence.

Which patches are of an image and not of padding is computed on the host: the image, the row and the
column of each, which the graph gathers by.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gracec.capture.families.base import Dims, Family, Inputs
from gracec.capture.serving_graph import BATCH
from gracec.errors import GracecError

SIZES = "image_sizes"
PLACES = "patch_places"


class Pixtral(Family):
    """`pixel_values` are [I, 3, H, W]; `PLACES` [P, 3] are image, row and column of each patch,
    in the order of the sequence."""

    vision: ClassVar[Dims] = {"pixel_values": (0, 2, 3), PLACES: (0,)}
    computed: ClassVar[tuple[str, ...]] = (SIZES,)
    serving: ClassVar[dict[str, dict[int, str]]] = {
        "pixel_values": {0: BATCH, 2: "height", 3: "width"},
        PLACES: {0: "num_patches"},
    }

    @abstractmethod
    def project(self, model: PreTrainedModel, hidden: Tensor, inputs: Inputs) -> Tensor:
        """Visual tokens [N, H] from what the tower makes of all patches [P, C]."""

    def merged(self, model: PreTrainedModel) -> int:
        """Rows of patches that become one token, and columns."""
        return 1

    def encode(self, model: PreTrainedModel, inputs: Inputs) -> Tensor:
        """Not the model's own tower, whose loop over images has sizes that depend on data."""
        tower: Any = model.model.vision_tower
        image, row, column = inputs[PLACES].unbind(-1)
        grid = tower.patch_conv(inputs["pixel_values"])
        patches = tower.ln_pre(grid.permute(0, 2, 3, 1)[image, row, column].unsqueeze(0))
        places = torch.stack([row, column], dim=-1)
        apart = image.unsqueeze(1) != image.unsqueeze(0)
        mask = torch.zeros(apart.shape, dtype=patches.dtype, device=patches.device)
        mask = mask.masked_fill(apart, torch.finfo(patches.dtype).min)
        hidden = [patches]
        rotary = tower.patch_positional_embedding(patches, places)
        for layer in tower.transformer.layers:
            hidden.append(layer(hidden[-1], mask[None, None], position_embeddings=rotary))
        layers = model.config.vision_feature_layer
        one = isinstance(layers, int)
        seen = hidden[layers] if one else torch.cat([hidden[layer] for layer in layers], -1)
        return self.project(model, seen.squeeze(0), inputs)

    def vision_inputs(self, model: PreTrainedModel, batch: Inputs) -> dict[str, Tensor]:
        found = []
        for image, size in enumerate(self.required(batch, SIZES).tolist()):
            rows, columns = (torch.arange(side // patch_size(model)) for side in size)
            found.append(torch.cartesian_prod(torch.tensor([image]), rows, columns))
        pixels = batch["pixel_values"]
        return {"pixel_values": pixels, PLACES: torch.cat(found).to(pixels.device)}

    def image_tokens(self, model: PreTrainedModel, batch: Inputs) -> list[int]:
        edge = patch_size(model) * self.merged(model)
        found: list[int] = (self.required(batch, SIZES) // edge).prod(-1).tolist()
        return found

    def check(self, model: PreTrainedModel, batch: Inputs) -> None:
        edge = patch_size(model) * self.merged(model)
        pixels, sizes = batch["pixel_values"], self.required(batch, SIZES)
        most = torch.tensor(pixels.shape[-2:], device=sizes.device)
        if len(pixels) != len(sizes) or (sizes % edge).any() or (sizes > most).any():
            raise GracecError(
                f"pixel_values are {tuple(pixels.shape)} and image_sizes {sizes.tolist()}: each "
                f"image has to fit, with sides that are multiples of {edge}",
                where=f"batch, {SIZES}",
                fix="use the model's own processor",
            )

    def example_images(
        self, model: PreTrainedModel, images: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        edge = patch_size(model) * self.merged(model)
        shapes = [(2 * edge, 2 * edge), (2 * edge, 3 * edge), (4 * edge, edge)]
        sizes = torch.tensor((shapes * images)[:images])
        channels = model.config.vision_config.num_channels
        shape = (images, channels, *sizes.amax(0).tolist())
        pixels = torch.randn(shape, generator=generator)
        for image, (height, width) in zip(pixels, sizes.tolist(), strict=True):
            image[:, height:], image[:, :, width:] = 0, 0
        return {"pixel_values": pixels, SIZES: sizes}


def patch_size(model: PreTrainedModel) -> int:
    """Pixels of a side of a patch."""
    size = model.config.vision_config.patch_size
    return int(size if isinstance(size, int) else size[0])
