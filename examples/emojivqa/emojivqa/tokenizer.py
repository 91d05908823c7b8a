"""The word-level tokenizer, its chat template and the processor of the EmojiVQA models."""

from functools import cache

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from .questions import words
from .scenes import SIZE

PATCH = 8
VISUAL_TOKENS = (SIZE // PATCH) ** 2
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>", "<user>", "<assistant>")
VOCABULARY_SIZE = 192
CHAT_TEMPLATE = (
    "<bos>"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<assistant>{% else %}<user>{% endif %}"
    "{% if message['content'] is string %} {{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}"
    " {{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %} <eos>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@cache
def vocabulary() -> dict[str, int]:
    """The number of each word; VOCABULARY_SIZE of them."""
    ids = {word: i for i, word in enumerate([*SPECIAL, *words()])}
    if len(ids) > VOCABULARY_SIZE:
        raise ValueError(f"{len(ids)} words do not fit in {VOCABULARY_SIZE}")
    return ids | {f"<spare{i}>": i for i in range(len(ids), VOCABULARY_SIZE)}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Lower-cases, splits off punctuation and maps each known word to one token."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\ban\b"), "a"),
            normalizers.Replace(Regex(r"[.,!]"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={
            "image_token": "<image>",
            "user_token": "<user>",
            "assistant_token": "<assistant>",
        },
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> LlavaProcessor:
    image_processor = CLIPImageProcessorPil(
        do_resize=True,
        size={"height": SIZE, "width": SIZE},
        do_center_crop=False,
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def prompt(question: str) -> list[dict]:
    """The chat of one image and one question."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]
