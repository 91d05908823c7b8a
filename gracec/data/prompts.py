"""Prompts: turns and pictures as messages, as text, and as the tokens and pixels of a model.

Training and evaluation both encode here, so that a model is asked as it was taught.

    prompts = Prompts(processor)
    batch = prompts.encode([messages(turns, images)], padding_side="right")
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from PIL import Image

from gracec.data.records import IMAGE_PLACEHOLDER, Turn
from gracec.data.templates import apply_chat_template
from gracec.errors import GracecError, first_line

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# What templates and processors raise for input that they do not take.
_REFUSALS = (
    *(ValueError, TypeError, LookupError, RuntimeError, ArithmeticError, AttributeError),
    *(MemoryError, TemplateError),
    StopIteration,  # of transformers before 5.23, for more placeholders than pictures
)

Message = dict[str, Any]
"""A role, and a list of parts that are texts and images, as chat templates take it."""


def messages(turns: Sequence[Turn], images: Sequence[Image.Image] = ()) -> list[Message]:
    """Turns with an image in the place of each placeholder; without `images` these are empty."""
    rest = iter(images)
    found = []
    for turn in turns:
        parts: list[dict[str, Any]] = []
        for number, text in enumerate(turn.text.split(IMAGE_PLACEHOLDER)):
            if number:
                parts.append(
                    {"type": "image", "image": next(rest)} if images else {"type": "image"}
                )
            if text.strip():
                parts.append({"type": "text", "text": text.strip()})
        found.append({"role": turn.role, "content": parts})
    return found


def question_about(image: Image.Image | None, question: str) -> list[Message]:
    """One turn: an image, if there is one, and a question as it is."""
    picture = [] if image is None else [{"type": "image", "image": image}]
    return [{"role": "user", "content": [*picture, {"type": "text", "text": question}]}]


def encode_questions(
    processor: Any,
    questions: Sequence[str],
    images: Sequence[Image.Image | None],
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """What a model takes for some questions, padded on the left.

    Args:
        images: what each is about, None for nothing.
        names: what to call each question in an error.

    Raises:
        GracecError: if the processor or its template refuses a question.
    """
    asked = [question_about(image, text) for text, image in zip(questions, images, strict=True)]
    names = names or [f"question {number}" for number in range(1, len(asked) + 1)]
    prompts = Prompts(processor)
    return prompts.encode(asked, names, padding_side="left", generation_prompt=True)


def padding_token(tokenizer: Any) -> str:
    """What a tokenizer pads with; where it does not say, a token that it has: the mask hides it."""
    named = (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token)
    found = next((token for token in named if token is not None), None)
    return str(tokenizer.convert_ids_to_tokens(0) if found is None else found)


@contextmanager
def able_to_pad(tokenizer: Any) -> Iterator[None]:
    """Inside, a tokenizer without a padding token has one; it is left as it was."""
    if getattr(tokenizer, "pad_token", "") is not None:
        yield
        return
    tokenizer.pad_token = padding_token(tokenizer)
    try:
        yield
    finally:
        tokenizer.pad_token = None


@contextmanager
def refusals(where: str) -> Iterator[None]:
    """What templates and processors raise inside becomes a GracecError of one line."""
    try:
        yield
    except _REFUSALS as error:
        raise _refused(error, where) from error


def _refused(error: Exception, where: str) -> GracecError:
    return GracecError(f"the processor refuses it ({first_line(error)})", where=where)


@dataclass(frozen=True)
class Prompts:
    """The text and the tokens of conversations, by the processor of a model.

    Args:
        processor: its chat template writes the text. Where it has none, the parts of all turns
            follow each other in lines.
        end: what closes an answer where there is no chat template.
    """

    processor: Any
    end: str = ""

    @property
    def tokenizer(self) -> Any:
        """Of the processor."""
        return self.processor.tokenizer

    @property
    def image_token(self) -> str:
        """What stands for an image in a text.

        Raises:
            GracecError: if the processor does not say.
        """
        token = getattr(self.processor, "image_token", None)
        if not isinstance(token, str):
            raise GracecError(
                "has no image token",
                where=type(self.processor).__name__,
                fix="give the model's processor, or set its chat_template",
            )
        return token

    @cached_property
    def image_id(self) -> int:
        """The token that an image becomes, many of it."""
        found = getattr(self.processor, "image_token_id", None)
        if found is None:
            found = self.tokenizer.convert_tokens_to_ids(self.image_token)
        return int(found)

    @property
    def templated(self) -> bool:
        """Whether there is a chat template."""
        return bool(getattr(self.processor, "chat_template", None))

    @cached_property
    def marks_answers(self) -> bool:
        """Whether the template says itself what the model has to generate."""
        template = getattr(self.processor, "chat_template", None)
        if isinstance(template, Mapping):
            template = template.get("default")
        fast = bool(getattr(self.tokenizer, "is_fast", False))
        return fast and isinstance(template, str) and bool(_GENERATION.search(template))

    def text(self, conversation: Sequence[Message], *, generation_prompt: bool = False) -> str:
        """A conversation as text, one placeholder an image; `generation_prompt` asks on."""
        if self.templated:
            rendered: list[str] = apply_chat_template(
                self.processor, [conversation], add_generation_prompt=generation_prompt
            )
            return rendered[0]
        lines = []
        for message in conversation:
            texts = [part.get("text", self.image_token) for part in message["content"]]
            end = self.end if message["role"] == "assistant" else ""
            lines.append("\n".join(texts) + end)
        return "\n".join(lines)

    @cached_property
    def takes_text_alone(self) -> bool:
        """Whether the processor takes a text without images; that of PaliGemma does not."""
        if self.templated:
            return True
        try:
            self.processor(text=["a"])
        except _REFUSALS:
            return False
        return True

    def tokens(self, text: str, images: Sequence[Image.Image] = ()) -> list[int]:
        """The tokens of a text, its images expanded; without `images` a placeholder is one."""
        if self.image_token not in text and not self.takes_text_alone:
            # What the processor makes of the text that follows images.
            bos = self.tokenizer.bos_token_id
            words: list[int] = self.tokenizer(f"{text}\n")["input_ids"]
            return words if bos is None else [bos, *words]
        # As `apply_chat_template` does: none are added where the template wrote the first.
        bos = self.tokenizer.bos_token
        written = self.templated and bos and text.startswith(bos)
        options = {"add_special_tokens": False} if written else {}
        if not images:
            plain: list[int] = self.tokenizer(text, **options)["input_ids"]
            return plain
        encoded = self.processor(images=[list(images)], text=[text], **options)
        return [int(token) for token in encoded["input_ids"][0]]

    def encode(
        self,
        conversations: Sequence[Sequence[Message]],
        names: Sequence[str],
        *,
        padding_side: Literal["left", "right"],
        generation_prompt: bool = False,
        answer_masks: bool = False,
    ) -> dict[str, Any]:
        """What the processor makes of some conversations, as one batch.

        Args:
            names: what to call each conversation in an error.
            padding_side: left to generate, right to learn.
            generation_prompt: whether to end with the beginning of an answer.
            answer_masks: whether to add `assistant_masks`, for a template that marks answers.

        Returns:
            `input_ids` and `attention_mask` int64 [B, T], the pixels, and whatever else the family
            takes; no labels.

        Raises:
            GracecError: naming the first conversation that is refused by itself.
        """
        template = {
            "add_generation_prompt": generation_prompt,
            "return_assistant_tokens_mask": answer_masks,
        }
        try:
            with able_to_pad(getattr(self.processor, "tokenizer", None)):
                return self._together(conversations, padding_side, template)
        except _REFUSALS as error:
            for conversation, name in zip(conversations, names, strict=True):
                with refusals(name):
                    self._together([conversation], padding_side, template)
            raise _refused(error, f"{names[0]} to {names[-1]}") from error

    def _together(
        self,
        conversations: Sequence[Sequence[Message]],
        padding_side: str,
        template: Mapping[str, bool],
    ) -> dict[str, Any]:
        # One alone is as long as itself; not every tokenizer has a token to pad with.
        several = len(conversations) > 1
        options = {"padding": several, "padding_side": padding_side, "return_tensors": "pt"}
        if self.templated:
            # Tokenized in the same call: it knows whether the template wrote the first token.
            encoded = apply_chat_template(
                self.processor,
                conversations,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",  # SmolVLM does not look for it among the options
                processor_kwargs=options,
                **template,
            )
        else:
            encoded = self._untemplated(conversations, options)
        return {name: value for name, value in encoded.items() if name != "labels"}

    def _untemplated(
        self, conversations: Sequence[Sequence[Message]], options: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        texts = [self.text(conversation) for conversation in conversations]
        images = [images_of(conversation) for conversation in conversations]
        if self.takes_text_alone or all(images):
            found: Mapping[str, Any] = self.processor(
                images=images if any(images) else None, text=texts, **options
            )
            return found
        found, rows = {}, [self.tokens(text) for text in texts]
        if pictured := [number for number, own in enumerate(images) if own]:
            found = self.processor(
                images=[images[number] for number in pictured],
                text=[texts[number] for number in pictured],
                **options,
            )
            masks = found["attention_mask"].bool()
            for number, ids, mask in zip(pictured, found["input_ids"], masks, strict=True):
                rows[number] = ids[mask].tolist()
        padded = self.tokenizer.pad({"input_ids": rows}, **options)
        if "token_type_ids" in self.processor.model_input_names:
            padded["token_type_ids"] = torch.zeros_like(padded["input_ids"])
        return {**found, **padded}


def images_of(conversation: Sequence[Message]) -> list[Image.Image]:
    """The pictures of a conversation, in order."""
    parts = [part for message in conversation for part in message["content"]]
    return [part["image"] for part in parts if part["type"] == "image"]
