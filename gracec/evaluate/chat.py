"""A conversation with a model: several turns, about pictures or none, remembered between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from gracec.data.pictures import as_loaded
from gracec.data.prompts import Message, Prompts
from gracec.errors import GracecError
from gracec.evaluate.ask import Generator, generate, inference, place


class Chat:
    """Asks a model one thing after the other; each time it is given all that was said before.

    Args:
        model: has `generate(**inputs, ...)` and `device`.
        processor: of the model; its chat template writes the conversation.
        system: what the model is told before the first turn.
        settings: for `generate`; greedy by default.
    """

    def __init__(
        self,
        model: Generator,
        processor: Any,
        *,
        system: str = "",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.prompts = model, Prompts(processor)
        self.settings = dict(settings or {})
        self.system = system
        self.messages: list[Message] = []
        self.reset()

    def reset(self) -> None:
        """Forget all that was said, but for what the model is told before it."""
        told = {"role": "system", "content": [{"type": "text", "text": self.system}]}
        self.messages = [told] if self.system else []

    def ask(self, text: str, images: Sequence[Image.Image] = (), streamer: Any = None) -> str:
        """The answer to one more turn. A turn that fails is forgotten.

        Args:
            images: what this turn is about, beside the pictures of those before.
            streamer: is given the tokens as they come, as streamers of transformers are.

        Raises:
            GracecError: if the processor refuses the conversation, or the model what it makes.
        """
        parts = [{"type": "image", "image": as_loaded(one, "an image")} for one in images]
        asked = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
        conversation = [*self.messages, asked]
        inputs = self.prompts.encode(
            [conversation], ["the question"], padding_side="left", generation_prompt=True
        )
        found = int((inputs["input_ids"] == self.prompts.image_id).sum()) if parts else 1
        if not found:
            raise GracecError(
                "the chat template leaves the image out",
                where="the question",
                fix="give a model whose template takes images",
            )
        with inference(self.model):
            (said,) = generate(
                self.model,
                self.prompts.processor,
                place(inputs, self.model),
                self.settings,
                streamer,
            )
        reply = {"role": "assistant", "content": [{"type": "text", "text": said}]}
        self.messages = [*conversation, reply]
        return said
