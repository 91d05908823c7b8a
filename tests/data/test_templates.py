import threading
import time
from typing import Any

import pytest
from jinja2 import TemplateError
from PIL import Image

from gracec.data import templates
from gracec.data.prompts import Prompts, encode_questions, question_about
from gracec.data.templates import apply_chat_template
from gracec.errors import GracecError
from tests.tiny import CHAT_TEMPLATE, tiny_image, tiny_processor

ASKED = [question_about(Image.new("RGB", (32, 32)), "what is this ?")]
DOUBLING = (
    "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}"
)
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
SQUARES = (
    "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}"
)


def rendered(template: str) -> Any:
    return apply_chat_template(tiny_processor(chat_template=template), ASKED)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 'a' * 10**10 }}", "it computes a power"),
        ("{{ 10 ** 10 ** 10 }}", "it computes a power"),
        ("{{ 5 | round(-1000000000) }}", "it rounds to a number of digits"),
        ("{{ [5] | map('round', -1000000000) | list }}", "it rounds to a number of digits"),
        ("{{ [5] | map(x, -1000000000) | list }}", "it rounds to a number of digits"),
        ("{{ 'a' * 10000000000 }}", "more memory"),
        ("{% set a = 'a' * 100000 %}{{ a * 100000 }}", "more memory"),
        ("{{ 'a' | center(10000000000) }}", "more memory"),
        ("{{ '%10000000000d' | format(1) }}", "fails"),
        ("{{ range(10000000000) }}", "Range too big"),
        (DOUBLING, "more memory"),
        (LOOPS, "takes longer than 1 seconds"),
        ("{{ 'a' * 20000000 }}", "it writes more than"),
        ("{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}", "nested too deeply"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "nested too deeply"),
        ("{{ raise_exception('only text') }}", "only text"),
        ("{% include 'other' %}", "no loader"),
        ("{{ messages[0].role + 1 }}", "can only concatenate str"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ nothing.more }}", "undefined"),
        ("{{ '{:>10000000000}'.format(1) }}", "fails"),
    ],
)
def test_a_template_that_fails_or_takes_too_much_ends_in_one_line(
    template: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "longer" in message:  # the others have the time that a busy machine needs
        monkeypatch.setattr(templates, "SECONDS", 1.0)
    started = time.perf_counter()
    with pytest.raises(GracecError) as error:
        encode_questions(tiny_processor(chat_template=template), ["what ?"], [tiny_image()])
    assert time.perf_counter() - started < 30
    assert message in str(error.value), error.value
    assert str(error.value).startswith("question 1: the processor refuses it (the chat template ")
    assert str(error.value).isprintable()


def test_numbers_that_grow_are_ended_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.5)
    started = time.perf_counter()
    with pytest.raises(TemplateError, match="takes longer|more memory"):
        rendered(SQUARES)
    assert time.perf_counter() - started < 30


def test_afterwards_everything_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    for template in (LOOPS, DOUBLING, "{{ 'a' * 10000000000 }}", CHAT_TEMPLATE):
        try:
            rendered(template)
        except TemplateError:
            assert template != CHAT_TEMPLATE
    assert resource.getrlimit(resource.RLIMIT_AS) == limit
    time.sleep(0.4)  # a watch that was forgotten would end this
    assert not [one for one in threading.enumerate() if isinstance(one, threading.Timer)]
    assert len(bytes(1 << 30)) == 1 << 30


def test_other_callers_of_transformers_get_its_own_rendering() -> None:
    processor = tiny_processor(chat_template="{{ 2 ** 3 }}")
    with pytest.raises(TemplateError, match="computes a power"):
        apply_chat_template(processor, ASKED)
    assert processor.apply_chat_template(ASKED) == ["8"]


def test_a_template_renders_as_without_bounds() -> None:
    processor = tiny_processor()
    assert (
        Prompts(processor).text(ASKED[0], generation_prompt=True)
        == (processor.apply_chat_template(ASKED, add_generation_prompt=True)[0])
    )


def test_threads_render_one_after_another() -> None:
    processor, found = tiny_processor(), []
    threads = [
        threading.Thread(target=lambda: found.append(apply_chat_template(processor, ASKED)))
        for _ in range(8)
    ]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(found) == 8 and all(text == found[0] for text in found)
