"""Prompts: messages, text, tokens, and what a refusal of the processor says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gracec.data.prompts import Prompts, encode_questions, messages, question_about
from gracec.data.records import Turn
from gracec.errors import GracecError
from tests.data.conversations import said
from tests.goldens import INSTALLED
from tests.tiny import CHAT_TEMPLATE, EOS, IMAGE, IMAGE_TOKENS, tiny_image, tiny_processor
from tests.tiny_families import PROCESSORS
from tests.tiny_families import tiny_processor as tiny_processor_of

MARKED = CHAT_TEMPLATE.replace("{{ '<image> '", "{% generation %}{{ '<image> '").replace(
    "{% endfor %}{{ '</s>", "{% endgeneration %}{% endfor %}{{ '</s>"
)


def test_an_image_stands_where_its_placeholder_stood() -> None:
    first, second = tiny_image(0), tiny_image(1)
    turns = (Turn("system", "be short"), *said("<image> what ? <image>\nand this ?", "red"))
    system, user, assistant = messages(turns, [first, second])
    assert user["content"] == [
        {"type": "image", "image": first},
        {"type": "text", "text": "what ?"},
        {"type": "image", "image": second},
        {"type": "text", "text": "and this ?"},
    ]
    assert system == {"role": "system", "content": [{"type": "text", "text": "be short"}]}
    assert assistant["role"] == "assistant"
    assert messages(turns)[1]["content"][0] == {"type": "image"}


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, None])
def test_a_question_is_asked_as_a_turn_is_taught(template: str | None) -> None:
    prompts = Prompts(tiny_processor(chat_template=template))
    image = tiny_image()
    taught = messages(said("<image>\nwhat is this ?"), [image])
    assert taught == question_about(image, "what is this ?")
    options: Any = {"padding_side": "left", "generation_prompt": True}
    found = prompts.encode([taught], ["it"], **options)
    asked = encode_questions(prompts.processor, ["what is this ?"], [image])
    assert all(torch.equal(found[name], asked[name]) for name in asked)
    # A question is encoded as it is, also where its placeholder makes it a wrong one.
    assert question_about(image, " <image> ? ")[0]["content"][1]["text"] == " <image> ? "


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_where_it_is_asked_for(side: Any) -> None:
    prompts = Prompts(tiny_processor())
    both = [question_about(tiny_image(), text) for text in ("what ?", "what is this ?")]
    mask = prompts.encode(both, ["a", "b"], padding_side=side)["attention_mask"]
    assert mask[0, :2].tolist() == ([0, 0] if side == "left" else [1, 1])
    assert mask[0, -2:].tolist() == ([1, 1] if side == "left" else [0, 0])


def test_text_without_a_chat_template_is_lines() -> None:
    prompts = Prompts(tiny_processor(chat_template=None), end="</s>")
    turns = said("<image> what ?", "red", "why ?", "no")
    assert prompts.text(messages(turns)) == "<image>\nwhat ?\nred</s>\nwhy ?\nno</s>"
    assert not prompts.templated
    ids = prompts.encode([messages(turns, [tiny_image()])], ["it"], padding_side="right")
    assert ids["input_ids"][0].tolist() == prompts.tokens(
        prompts.text(messages(turns)), [tiny_image()]
    )


def test_tokens_of_a_text() -> None:
    """Nothing is written before the template's own first token; images expand if given."""
    prompts = Prompts(tiny_processor())
    text = prompts.text(messages(said("<image> what ?")), generation_prompt=True)
    assert text.startswith("<s> USER : <image>") and text.rstrip().endswith("ASSISTANT :")
    plain, expanded = prompts.tokens(text), prompts.tokens(text, [tiny_image()])
    assert plain.count(IMAGE) == 1 and expanded.count(IMAGE) == IMAGE_TOKENS
    assert [token for token in plain if token != IMAGE] == [t for t in expanded if t != IMAGE]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, None])
def test_the_tokenizer_adds_none_where_the_template_wrote_the_first(template: str | None) -> None:
    processor: Any = tiny_processor(chat_template=template)
    asked: dict[str, bool] = {}

    class Tokenizer:
        bos_token = "<s>"

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            asked[text] = add_special_tokens
            return {"input_ids": []}

    processor.tokenizer = Tokenizer()
    for text in ("<s> <image> what ?", "<image> what ?"):
        Prompts(processor).tokens(text)
    assert asked == {"<s> <image> what ?": template is None, "<image> what ?": True}


def test_masks_of_answers_and_no_labels() -> None:
    marked, plain = (Prompts(tiny_processor(chat_template=t)) for t in (MARKED, CHAT_TEMPLATE))
    assert marked.marks_answers and not plain.marks_answers
    one = [messages(said("<image> what ?", "red"), [tiny_image()])]
    found = marked.encode(one, ["it"], padding_side="right", answer_masks=True)
    assert torch.as_tensor(found["assistant_masks"]).sum() > 0
    assert "assistant_masks" not in plain.encode(one, ["it"], padding_side="right")
    assert "labels" not in found and int(found["input_ids"][0, -1]) == EOS


def test_a_refusal_names_the_first_that_fails_by_itself() -> None:
    questions = ["what ?", "is <image> it ?", "is <image> it ?"]
    images = [tiny_image()] * 3
    why = ".*2 <image>" if INSTALLED >= (5, 23) else "StopIteration"  # older ones say no more
    with pytest.raises(GracecError, match=rf"^b: the processor refuses it \({why}") as caught:
        encode_questions(tiny_processor(), questions, images, ["a", "b", "c"])
    assert "\n" not in str(caught.value)
    with pytest.raises(GracecError, match="^question 2: the processor refuses it"):
        encode_questions(tiny_processor(), questions, images)


def test_a_refusal_of_the_whole_batch_names_its_ends() -> None:
    class One:
        chat_template = "it has one"

        def apply_chat_template(self, conversations: Any, **_: Any) -> dict[str, Any]:
            if len(conversations) > 1:
                raise ValueError("one at a time\nplease")
            return {}

    with pytest.raises(GracecError, match=r"^a to c: the processor refuses it \(one at a time\)$"):
        encode_questions(One(), ["?"] * 3, [tiny_image()] * 3, ["a", "b", "c"])


def test_a_processor_without_template_and_image_token() -> None:
    processor: Any = tiny_processor(chat_template=None)
    processor.image_token = None
    with pytest.raises(GracecError, match="LlavaProcessor: has no image token.*chat_template"):
        encode_questions(processor, ["what ?"], [tiny_image()])


@pytest.mark.parametrize("family", PROCESSORS)
def test_texts_without_a_picture_have_the_tokens_that_they_have_alone(family: str) -> None:
    """Beside one with a picture, and with no picture in the batch."""
    prompts = Prompts(tiny_processor_of(family))
    text, more = (messages(said(said_)) for said_ in ("what is this ?", "yes or no ?"))
    pictured = messages(said("<image> where ?"), [tiny_image()])
    alone = prompts.encode([text], ["it"], padding_side="right")["input_ids"][0].tolist()
    assert alone == prompts.tokens(prompts.text(text))
    for batch in ([text, more], [pictured, text, more]):
        found = prompts.encode(batch, ["a", "b", "c"][: len(batch)], padding_side="right")
        row = batch.index(text)
        kept = found["attention_mask"][row].bool()
        assert found["input_ids"][row][kept].tolist() == alone
        assert ("pixel_values" in found) == (pictured in batch)
        assert not (found["input_ids"][row] == prompts.image_id).any()


def test_a_text_for_paligemma_alone_is_what_follows_an_image() -> None:
    prompts = Prompts(tiny_processor_of("paligemma"))
    pictured = prompts.encode(
        [messages(said("<image> what ?"), [tiny_image()])], ["it"], padding_side="right"
    )["input_ids"][0]
    text = prompts.tokens("what ?")
    assert pictured[pictured != prompts.image_id].tolist() == text


def test_questions_need_no_padding_token() -> None:
    processor = tiny_processor()
    expected = encode_questions(processor, ["what is this ?"], [tiny_image(1)])
    processor.tokenizer.pad_token = None
    found = encode_questions(processor, ["what is this ?"], [tiny_image(1)])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    both = [["what ?", "what is this ?"], [tiny_image(1), tiny_image(2)]]
    found = encode_questions(processor, *both)
    expected = encode_questions(tiny_processor(), *both)
    assert torch.equal(found["attention_mask"], expected["attention_mask"])
    processor.tokenizer.eos_token = processor.tokenizer.bos_token = None
    assert encode_questions(processor, *both)["input_ids"].shape == expected["input_ids"].shape
    assert processor.tokenizer.pad_token is None
