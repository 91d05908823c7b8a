"""A few samples as captured graphs take them: read once, for student, teacher and scores."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gracec.capture import family_of
from gracec.data.collate import PICTURES
from gracec.objective import Targets, supervised_positions
from gracec.objective.labels import IGNORE_INDEX

Batch = Mapping[str, Tensor]
"""What a processor returns, with labels int64 [B, T]."""


def labels_everywhere(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Labels int64 [B, T] of every token of text, without padding and the places of images."""
    images, _ = family_of(model).image_index(model, batch)
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    said = (images.to(ids.device) < 0) & real
    said[:, 1:] &= real[:, :-1]  # nothing predicts the first token behind padding
    return torch.where(said, ids, IGNORE_INDEX)


def sample_keys(batch: Batch, index: Tensor) -> tuple[str, ...]:
    """A digest of each sample of a batch that names its pictures: of its tokens, the positions that
    are supervised, and its pictures. Padding, and what else is in the batch, is nothing to it.

    Args:
        index: int64 [S], flat positions that are supervised.
    """
    real = batch["attention_mask"].bool().cpu()
    supervised = torch.zeros(real.numel(), dtype=torch.bool)
    supervised[index.cpu()] = True
    rows = zip(
        batch["input_ids"].cpu(), supervised.view_as(real), real, batch[PICTURES], strict=True
    )
    found = []
    for ids, wanted, row, pictures in rows:
        digest = hashlib.sha256(pictures.cpu().numpy().tobytes())
        digest.update(ids[row].to(torch.int64).numpy().tobytes())
        digest.update(wanted[row].numpy().tobytes())
        found.append(digest.hexdigest())
    return tuple(found)


@dataclass(frozen=True)
class MicroBatch:
    """What any model of the same configuration takes and is held to; widths and dtypes may differ.

    Attributes:
        inputs: of the graph, but for the index, with pixels as the processor returned them.
        index: int64 [S], flat positions b * T + t whose next token is supervised.
        labels: int64 [S], these tokens.
        shape: (B, T).
        image_index: int64 [B, T], the number of the image of each token, -1 for text; if asked for.
        image_sizes: tokens of each image, if asked for.
        keys: what tells each sample from others, `sample_keys`; where the batch names its pictures.
    """

    inputs: Mapping[str, Tensor]
    index: Tensor
    labels: Tensor
    shape: tuple[int, int]
    image_index: Tensor | None = None
    image_sizes: tuple[int, ...] | None = None
    keys: tuple[str, ...] | None = None

    @classmethod
    def read(
        cls,
        model: PreTrainedModel,
        batch: Batch,
        *,
        images: bool = False,
        everywhere: bool = False,
    ) -> MicroBatch:
        """From what the processor returned and the labels; all tensors on the model's device.

        Args:
            images: whether to tell which token is of which image.
            everywhere: whether every token of text is a target, whatever the labels say.

        Raises:
            GracecError: if the graph does not take the batch.
        """
        family, device = family_of(model), model.device
        inputs = family.read(model, batch)
        marked = labels_everywhere(model, batch) if everywhere else batch["labels"]
        index, labels = supervised_positions(marked)
        rows, length = marked.shape
        owners, sizes = family.image_index(model, batch) if images else (None, None)
        return cls(
            # From pinned memory the copy goes on beside what follows.
            inputs={n: tensor.to(device, non_blocking=True) for n, tensor in inputs.items()},
            index=index.to(device),
            labels=labels.to(device),
            shape=(rows, length),
            image_index=None if owners is None else owners.to(device),
            image_sizes=None if sizes is None else tuple(sizes),
            keys=sample_keys(batch, index) if PICTURES in batch else None,
        )

    @property
    def targets(self) -> Targets:
        """What the objective holds outputs to."""
        return Targets(self.labels, self.image_index, self.image_sizes)

    @property
    def rows(self) -> Tensor:
        """int64 [S]: the sample of each supervised position."""
        return self.index // self.shape[1]
