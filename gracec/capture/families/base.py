"""What the compiler needs to know about a model family, and nothing more."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Self, TypeAlias

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from gracec.capture.families.check import check_image_tokens
from gracec.capture.families.examples import example_prompts
from gracec.capture.serving_graph import (
    BATCH,
    DECODER,
    EMBEDDING,
    LENGTH,
    VISION,
    ServingGraph,
    Shape,
    decoder_graph,
    embedding_graph,
)
from gracec.errors import GracecError

Inputs: TypeAlias = Mapping[str, Tensor]
Dims: TypeAlias = dict[str, tuple[int, ...]]
"""Name of an input -> its dynamic dimensions."""

VIDEO = ("pixel_values_videos", "video_grid_thw")


class Family(ABC):
    """Adapter of one model family.

    What depends on data is either computed on the host, by `prepare`, or in the graph without any
    size that depends on it. The traced module encodes the images and then runs the Hugging Face
    forward with the features in the place of the pixels.

    Attributes:
        model_type: of the Hugging Face config.
        text: inputs of the graph that go to the Hugging Face forward as they are.
        vision: inputs of the graph that `encode` takes.
        computed: names that a processor returns and `prepare` computes itself.
        serving: input of `vision` -> its dynamic dimensions and what a runtime calls them; without
            it there are no serving graphs.
        serving_names: input of `vision` -> its name in the vision encoder, where clients look for
            another one.
        serving_positions: shape of the decoder's position ids.
        serving_refusal: why there are no serving graphs, where there are none.
        serving_config: fields of the text config that clients look for at the top of config.json.
    """

    model_type: ClassVar[str]
    text: ClassVar[Dims] = {"input_ids": (0, 1), "attention_mask": (0, 1)}
    vision: ClassVar[Dims]
    computed: ClassVar[tuple[str, ...]] = ()
    serving: ClassVar[dict[str, dict[int, str]]] = {}
    serving_names: ClassVar[dict[str, str]] = {}
    serving_positions: ClassVar[Shape] = (BATCH, LENGTH)
    serving_refusal: ClassVar[str] = "has no serving graphs yet"
    serving_config: ClassVar[tuple[str, ...]] = ()
    _instance: ClassVar[Family]

    @classmethod
    def instance(cls) -> Self:
        """The one adapter of this class: it may keep what it has asked a model once."""
        # Kept by the class, so that both go when nothing else refers to them.
        if "_instance" not in vars(cls):
            cls._instance = cls()
        found: Self = vars(cls)["_instance"]
        return found

    def of(self, config: PreTrainedConfig) -> Family:
        """The adapter for a model of this type: another one if a part of the model needs it."""
        return self

    @abstractmethod
    def image_tokens(self, model: PreTrainedModel, batch: Inputs) -> list[int]:
        """Visual tokens of each image of a batch from the processor, in order.

        Args:
            model: only its config is looked at.
        """

    @abstractmethod
    def encode(self, model: PreTrainedModel, inputs: Inputs) -> Tensor:
        """Projected visual tokens [N, H] of all images, as they are traced.

        Args:
            inputs: those of `vision`.
        """

    def example_images(
        self, model: PreTrainedModel, images: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """What a processor returns for some images, of several shapes if the family has them.

        By default `pixel_values` [I, C, H, W] of the size that the tower takes.
        """
        channels = getattr(model.config.vision_config, "num_channels", 3)
        shape = (images, channels, *image_size(model))
        return {"pixel_values": torch.randn(shape, generator=generator)}

    def vision_inputs(self, model: PreTrainedModel, batch: Inputs) -> dict[str, Tensor]:
        """The inputs of `vision` from what the processor returned."""
        return {name: self.required(batch, name) for name in self.vision}

    def text_inputs(self, model: PreTrainedModel, batch: Inputs) -> dict[str, Tensor]:
        """The inputs of `text` from what the processor returned."""
        ids = self.required(batch, "input_ids")
        mask = batch.get("attention_mask")
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}

    def check(self, model: PreTrainedModel, batch: Inputs) -> None:
        """Refuse a batch that the graph would compute nonsense from.

        By default images that are not of the size that the tower takes.

        Raises:
            GracecError: naming what is wrong.
        """
        size = image_size(model)
        found = tuple(batch["pixel_values"].shape[-2:])
        if found != size:
            raise GracecError(
                f"images are {found[0]} x {found[1]} pixels, the tower takes {size[0]} x {size[1]}",
                where="pixel_values",
                fix="use the model's own processor",
            )

    def prepare(self, model: PreTrainedModel, batch: Inputs) -> dict[str, Tensor]:
        """The graph's inputs, in order, from what the processor returned.

        Args:
            model: only its config and dtype are looked at.

        Raises:
            GracecError: if an input is missing, is of a kind that is not captured, or image tokens
                and images disagree.
        """
        return self.cast(model, self.read(model, batch))

    def read(self, model: PreTrainedModel, batch: Inputs) -> dict[str, Tensor]:
        """What `prepare` does before it casts: the same for all models of one configuration.

        A batch without images gets one that no token stands for: the graph takes no empty tensors,
        and what it computes of the text does not depend on it.
        """
        ids = self.required(batch, "input_ids")
        for name in VIDEO:
            if batch.get(name) is not None:
                raise GracecError(
                    "videos are not captured: the graph takes images only",
                    where=f"batch, {name}",
                    fix="pass frames as images",
                )
        if self.without_images(model, batch):
            unseen = self.example_images(model, 1, torch.Generator().manual_seed(0))
            batch = {**batch, **{name: tensor.to(ids.device) for name, tensor in unseen.items()}}
        else:
            self.required(batch, "pixel_values")
            self.check(model, batch)
            check_image_tokens(self.image_mask(model, batch), self.image_tokens(model, batch))
        found = {**self.text_inputs(model, batch), **self.vision_inputs(model, batch)}
        return {name: found[name] for name in (*self.text, *self.vision)}

    def without_images(self, model: PreTrainedModel, batch: Inputs) -> bool:
        """Whether a batch from the processor is text alone."""
        given = batch.get("pixel_values") is not None
        return not given and not bool(self.image_mask(model, batch).any())

    def cast(self, model: PreTrainedModel, inputs: Inputs) -> dict[str, Tensor]:
        """Inputs that were read, pixels in the dtype of the model."""
        return {**inputs, "pixel_values": inputs["pixel_values"].to(model.dtype)}

    def model_inputs(self, model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What the Hugging Face forward takes, from what the processor returned."""
        return {
            name: _in_dtype(tensor, model.dtype) if isinstance(tensor, Tensor) else tensor
            for name, tensor in batch.items()
            if name != "labels" and tensor is not None
        }

    def image_mask(self, model: PreTrainedModel, batch: Inputs) -> Tensor:
        """bool [B, T]: which tokens are placeholders of images."""
        mask: Tensor = batch["input_ids"] == model.config.image_token_id
        return mask

    def image_index(self, model: PreTrainedModel, batch: Inputs) -> tuple[Tensor, list[int]]:
        """Which image each token belongs to, from what the processor returned.

        Returns:
            int64 [B, T], the number of the image in the batch or -1 for text, and the number of
            tokens of each image.
        """
        visual = self.image_mask(model, batch)
        sizes = self.image_tokens(model, batch) if visual.any() else []
        numbers = torch.arange(len(sizes), device=visual.device)
        counts = torch.tensor(sizes, dtype=torch.int64, device=visual.device)
        index = torch.full(visual.shape, -1, dtype=torch.int64, device=visual.device)
        index[visual] = numbers.repeat_interleave(counts)
        return index, sizes

    def traced(self, model: PreTrainedModel) -> nn.Module:
        """The module to export; it holds the model as its only child, named `model`."""
        return Flat(model, (*self.text, *self.vision), self.logits)

    def logits(self, model: PreTrainedModel, inputs: Inputs) -> Tensor:
        """Logits [B, T, V] of prepared inputs, as they are traced."""
        found: Any = model(
            **self.text_arguments(model, inputs),
            mm_encoder_outputs=self.encoder_outputs(model, inputs),
            use_cache=False,
        )
        logits: Tensor = found.logits
        return logits

    def text_arguments(self, model: PreTrainedModel, inputs: Inputs) -> dict[str, Any]:
        """Arguments of the Hugging Face forward beside images, as they are traced."""
        return {name: inputs[name] for name in self.text}

    def encoder_outputs(self, model: PreTrainedModel, inputs: Inputs) -> dict[str, Any]:
        """What the Hugging Face forward takes in the place of pixels."""
        features: Any = [self.encode(model, inputs)]
        return {"image": BaseModelOutputWithPooling(pooler_output=features)}

    def dynamic_shapes(self) -> dict[str, dict[int, Any]]:
        """Dynamic dimensions of each input of the graph."""
        dims = {**self.text, **self.vision}
        return {name: dict.fromkeys(axes, Dim.DYNAMIC) for name, axes in dims.items()}

    def example_batch(
        self,
        model: PreTrainedModel,
        *,
        batch: int = 2,
        images: int = 3,
        text: int = 7,
        generator: torch.Generator | None = None,
        pictures: Inputs | None = None,
    ) -> dict[str, Tensor]:
        """A left-padded batch built from the config alone, as a processor would return it.

        Args:
            batch: prompts; the images are shared out among them, the first ones getting one more.
            images: images in the whole batch.
            text: text tokens of the longest prompt; each further prompt has one fewer, but enough
                to keep its images apart.
            generator: of the words and the pixels; by default one of seed 0, so that it is the same
                batch each time.
            pictures: what a processor returned for the images; by default they are made up.
        """
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        pictures = dict(pictures or self.example_images(model, images, generator))
        sizes = self.image_tokens(model, pictures)
        prompts = example_prompts(model.config, sizes, generator, batch=batch, text=text)
        found = {**prompts, **pictures}
        found |= self.example_text(model, found)
        return {
            name: _in_dtype(tensor.to(model.device), model.dtype) for name, tensor in found.items()
        }

    def example_text(self, model: PreTrainedModel, batch: Inputs) -> dict[str, Tensor]:
        """What else the processor of the family returns about an example batch."""
        return {}

    def serving_graphs(self, model: PreTrainedModel) -> dict[str, ServingGraph]:
        """The graphs for a runtime: `vision_encoder`, `embed_tokens`, `decoder`.

        Raises:
            GracecError: if there are none for this family.
        """
        if not self.serving:
            raise GracecError(self.serving_refusal, where=f"family {self.model_type}")
        outside = {self.serving_names.get(name, name): name for name in self.vision}

        def encode(model: PreTrainedModel, inputs: Inputs) -> Tensor:
            return self.encode(model, {own: inputs[name] for name, own in outside.items()})

        prepared = self.prepare(model, self.example_batch(model, batch=2, images=4))
        example = self.serving_example({name: prepared[own] for name, own in outside.items()})
        shapes: dict[str, Shape] = {
            name: tuple(self.serving[own].get(axis, size) for axis, size in enumerate(tensor.shape))
            for (name, own), tensor in zip(outside.items(), example.values(), strict=True)
        }
        hidden = model.config.get_text_config().hidden_size
        features: dict[str, Shape] = {"image_features": ("num_image_tokens", hidden)}
        return {
            VISION: ServingGraph(Flat(model, outside, encode), example, shapes, features),
            EMBEDDING: embedding_graph(model),
            DECODER: decoder_graph(model, self.serving_positions),
        }

    def serving_example(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Inputs of the vision encoder in which no dynamic dimension is 1."""
        return inputs

    def vision_feed(self, inputs: Inputs) -> dict[str, Tensor]:
        """Inputs of the vision encoder, by the names that it has for them, of prepared ones.

        Raises:
            GracecError: if there are more than it takes at once.
        """
        return {self.serving_names.get(name, name): inputs[name] for name in self.vision}

    def merge(
        self, config: PreTrainedConfig, input_ids: Tensor, embeds: Tensor, features: Tensor
    ) -> Tensor:
        """Embeddings [B, T, H] with visual tokens [N, H] in the place of their placeholders."""
        merged = embeds.clone()
        merged[input_ids == config.image_token_id] = features.to(embeds.dtype)
        return merged

    def positions(self, attention_mask: Tensor) -> Tensor:
        """Positions of all tokens of prompts without images, as the decoder takes them.

        Args:
            attention_mask: int64 [B, T].

        Returns:
            int64 [B, T] (in some families [3, B, T]); padding on the left has position 0.
        """
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)

    def required(self, batch: Inputs, name: str) -> Tensor:
        """An input that there has to be.

        Raises:
            GracecError: if it is missing.
        """
        found = batch.get(name)
        if found is None:
            fix = "use the processor"
            if name == "pixel_values":
                fix = "give the images that the prompts have placeholders for"
            raise GracecError(f"{name} is missing", where="batch", fix=fix)
        return found


def image_size(model: PreTrainedModel) -> tuple[int, int]:
    """Height and width of the images that the tower takes.

    Raises:
        GracecError: if the configuration does not say.
    """
    size = getattr(model.config.vision_config, "image_size", None)
    if isinstance(size, int):
        return size, size
    if size is None:
        raise GracecError(
            "the configuration of the tower says no image_size", where=type(model).__name__
        )
    height, width = size
    return int(height), int(width)


class Flat(nn.Module):
    """A function of a model and named tensors as a module that has one argument a tensor.

    torch.export names inputs and dynamic shapes by the arguments.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        names: Iterable[str],
        compute: Callable[[PreTrainedModel, dict[str, Tensor]], Any],
    ) -> None:
        super().__init__()
        self.model = model

        def forward(**inputs: Tensor) -> Any:
            return compute(model, inputs)

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(name, kind) for name in names]
        signature: Any = forward
        signature.__signature__ = inspect.Signature(parameters)
        self.forward = forward


def _in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
