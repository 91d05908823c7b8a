"""One word is one token, and the chat template is what training used."""

import pytest
from emojivqa.packing import encode, prefix_ids
from emojivqa.questions import evaluation_questions, words
from emojivqa.tokenizer import VISUAL_TOKENS, build_processor, prompt, vocabulary
from PIL import Image


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def ids(processor, question: str) -> list[int]:
    text = processor.apply_chat_template(prompt(question), add_generation_prompt=True)
    return processor(text=text, images=Image.new("RGB", (64, 64)))["input_ids"][0]


def test_every_word_is_one_token_and_comes_back(processor) -> None:
    assert len(set(words())) == len(words())
    for word in words():
        (token,) = processor.tokenizer(word)["input_ids"]
        assert processor.tokenizer.decode([token]) == word
    assert len(processor.tokenizer) == 192
    assert processor.tokenizer("zeppelin")["input_ids"] == [vocabulary()["<unk>"]]


@pytest.mark.parametrize(
    ("loose", "exact"),
    [
        ("Where is the cat?", "where is the cat ?"),
        ("Is there an apple?", "is there a apple ?"),
        ("  How many ANIMALS are there ? ", "how many animals are there ?"),
    ],
)
def test_case_and_punctuation_do_not_matter(processor, loose: str, exact: str) -> None:
    assert ids(processor, loose) == ids(processor, exact)


def test_prompts_are_the_tokens_of_training(processor) -> None:
    unknown = vocabulary()["<unk>"]
    for question in evaluation_questions("validation", 11):
        tokens, expected = encode(question)
        asked = ids(processor, question.text)
        assert asked == prefix_ids() + tokens[: len(asked) - len(prefix_ids())]
        assert unknown not in asked
        answer = [token for token in expected if token >= 0]
        assert processor.tokenizer.decode(answer, skip_special_tokens=True) == question.answer
        assert answer[-1] == processor.tokenizer.eos_token_id


def test_a_conversation_with_its_answer_ends_a_turn(processor) -> None:
    chat = [*prompt("where is the cat ?"), {"role": "assistant", "content": "top left"}]
    text = processor.apply_chat_template(chat)
    assert text == "<bos><user><image> where is the cat ?<assistant> top left <eos>"


def test_the_image_takes_as_many_tokens_as_it_has_features(processor) -> None:
    image = vocabulary()["<image>"]
    assert ids(processor, "where is the cat ?").count(image) == VISUAL_TOKENS == 64
