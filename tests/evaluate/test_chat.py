"""A conversation remembers what was said, and what was shown."""

from __future__ import annotations

import pytest
import torch

from gracec.errors import GracecError
from gracec.evaluate import Chat, answer
from tests.tiny import tiny_image, tiny_llava, tiny_processor


def test_all_that_was_said_is_given_again() -> None:
    model, processor = tiny_llava().eval(), tiny_processor()
    chat = Chat(model, processor, system="red", settings={"max_new_tokens": 4})
    first = chat.ask("what is this ?", [tiny_image(0), tiny_image(1)])
    second = chat.ask("where is it ?")
    roles = [message["role"] for message in chat.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    asked = [*chat.messages[:3], chat.messages[3]]
    assert asked[2]["content"] == [{"type": "text", "text": first}]
    inputs = chat.prompts.encode([asked], ["all"], padding_side="left", generation_prompt=True)
    assert len(inputs["pixel_values"]) == 2
    made = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    new = made[:, inputs["input_ids"].shape[1] :]
    assert second == processor.batch_decode(new, skip_special_tokens=True)[0].strip()
    chat.reset()
    assert [message["role"] for message in chat.messages] == ["system"]


def test_alone_it_answers_as_a_question_does() -> None:
    model, processor = tiny_llava().eval(), tiny_processor()
    chat = Chat(model, processor, settings={"max_new_tokens": 4})
    said = chat.ask("what is this ?", [tiny_image(0)])
    assert said == answer(model, processor, tiny_image(0), "what is this ?", max_new_tokens=4)


def test_settings_are_those_of_generate_and_a_turn_that_fails_is_forgotten() -> None:
    model, processor = tiny_llava().eval(), tiny_processor()
    drawn = {"do_sample": True, "temperature": 9.0, "max_new_tokens": 8}
    answers = set()
    for seed in range(4):
        torch.manual_seed(seed)
        answers.add(Chat(model, processor, settings=drawn).ask("what is this ?"))
    assert len(answers) > 1
    chat = Chat(model, processor, settings={"temprature": 1.0})
    with pytest.raises(GracecError, match="temprature"):
        chat.ask("what is this ?")
    assert chat.messages == []
