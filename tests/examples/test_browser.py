"""The page in a real browser: answers, keyboard, phone, errors, and no request to anywhere else."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gracec.serve import Server
from tests.chromium import CHROMIUM, SOFTWARE_WEBGPU, Browser
from tests.examples.conftest import ROOT, Asked, Tried
from tests.npm import install

PAGE = ROOT / "examples/browser"
LOADED = "/Loaded in|Not loaded/.test(document.querySelector('#state').textContent)"
STATE = "document.querySelector('#state').textContent"
ERROR = "document.querySelector('#error').textContent"
READY = "!document.querySelector('#send').disabled"
NO_WEBGPU = "--disable-blink-features=WebGPU"

Open = Callable[..., Browser]


@pytest.fixture(scope="session", autouse=True)
def _programs() -> None:
    install(PAGE)
    if not CHROMIUM:
        pytest.skip("chromium is not installed")


@pytest.fixture
def open_page(tmp_path: Path) -> Iterator[Open]:
    """open_page(directory): a browser that shows the page, for a model that is served."""
    opened: list[tuple[Browser, Server]] = []

    def show(directory: Path, query: str = "", *flags: str, wait: bool = True) -> Browser:
        server = Server(directory, PAGE, port=0)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = Browser(tmp_path / f"profile-{len(opened)}", flags)
        opened.append((browser, server))
        browser.open(f"{server.url}{query}")
        if wait:
            browser.wait_for(f"document.readyState === 'complete' && {LOADED}", 240)
        return browser

    yield show
    for browser, server in opened:
        browser.close()
        server.shutdown()
        server.server_close()
        asked = [url.removeprefix("blob:") for url in browser.requests]
        assert asked
        assert [url for url in asked if not url.startswith(server.url)] == []


def tokens(browser: Browser, one: Asked) -> list[int]:
    """Ask a question on the page and wait for the tokens of the answer."""
    browser.choose_file("#file", one.image)
    browser.wait_for(f"document.querySelector('#shown').alt === '{one.image.name}' && {READY}")
    browser.evaluate(f"document.querySelector('#question').value = {one.question!r}")
    before = browser.evaluate("document.querySelectorAll('#answers li').length")
    browser.evaluate("document.querySelector('#ask').requestSubmit()")
    newest = f"document.querySelectorAll('#answers li[data-tokens]').length > {before}"
    browser.wait_for(f"{newest} || {ERROR}", 240)
    found = browser.evaluate("document.querySelector('#answers li')?.dataset.tokens")
    return [int(token) for token in found.split()]


def check_tokens(browser: Browser, tried: Tried, count: int) -> None:
    found = [tokens(browser, one) for one in tried.asked[:count]]
    expected = [one.tokens for one in tried.asked[:count]]
    assert [answer[: len(right)] for answer, right in zip(found, expected, strict=True)] == expected


def test_the_tokens_are_those_of_python_and_come_one_by_one(tiny: Tried, open_page: Open) -> None:
    browser = open_page(tiny.directory)
    assert "llava, 14 INT4 kernels (faithful), 0.2 MB" in browser.evaluate(STATE)
    assert "on WebAssembly" in browser.evaluate(STATE)
    assert browser.evaluate("crossOriginIsolated") is True
    browser.evaluate(
        "window.lengths = []; new MutationObserver(() => lengths.push("
        "document.querySelector('#answers .answer')?.textContent.length)"
        ").observe(document.querySelector('#answers'), {childList: true, subtree: true})"
    )
    check_tokens(browser, tiny, len(tiny.asked))
    assert len(set(browser.evaluate("lengths"))) > 5
    figures = browser.evaluate("document.querySelector('#answers .figures').textContent")
    assert figures.startswith("WebAssembly · first token ")
    assert " tokens/s" in figures
    assert browser.console == []


def test_by_keyboard_alone_and_on_a_phone(tiny: Tried, open_page: Open) -> None:
    browser = open_page(tiny.directory)
    browser.resize(360, 640, phone=True)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 360
    focus = "document.activeElement"
    for _ in range(12):
        browser.press("Tab")
        if browser.evaluate(f"{focus}.matches('.samples button')"):
            break
    browser.press("Enter")
    browser.wait_for(f"{READY} && {focus}.ariaPressed === 'true'")
    for _ in range(12):
        browser.press("Tab")
        if browser.evaluate(f"{focus}.id === 'question'"):
            break
    browser.evaluate(f"{focus}.select()")
    browser.press("what is this ?", "Enter")
    browser.wait_for("document.querySelectorAll('#answers li[data-tokens]').length")
    asked = browser.evaluate("document.querySelector('#answers .question').textContent")
    assert asked == "what is this ?"
    small = (
        "[...document.querySelectorAll('button, select')].filter(e => e.offsetHeight < 32).length"
    )
    assert browser.evaluate(small) == 0
    assert browser.evaluate("document.documentElement.scrollWidth") <= 360


def test_mistakes_are_readable(tiny: Tried, open_page: Open, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny.directory, tmp_path / "model"))
    browser = open_page(directory, "?device=webgpu", NO_WEBGPU)
    assert browser.evaluate(ERROR) == "This browser offers no WebGPU here. Choose WebAssembly."
    choose = "d = document.querySelector('#device'); d.value = 'wasm'; d.onchange()"
    browser.evaluate(choose)
    browser.wait_for("/Loaded in/.test(document.querySelector('#state').textContent)", 240)
    assert browser.evaluate(ERROR) == ""
    text = tmp_path / "text.png"
    text.write_text("no picture")
    browser.choose_file("#file", text)
    browser.wait_for(f"{ERROR} === 'text.png is no picture that this browser can read.'")
    for name in ("decoder_model_merged_q4.onnx", "session.json"):
        (directory / "onnx" / name).unlink()
        browser.evaluate(choose)
        browser.wait_for("document.querySelector('#state').textContent === 'Not loaded'")
        assert f"model/onnx/{name} is missing" in browser.evaluate(ERROR)
    assert "Compile with --format onnx." in browser.evaluate(ERROR)


@pytest.mark.slow
def test_the_shipped_student(student: Tried, open_page: Open) -> None:
    check_tokens(open_page(student.directory), student, len(student.asked))


@pytest.mark.slow
def test_the_shipped_student_on_webgpu(student: Tried, open_page: Open) -> None:
    browser = open_page(student.directory, "?device=webgpu", *SOFTWARE_WEBGPU)
    if "no WebGPU" in browser.evaluate(ERROR):
        pytest.skip("this chromium has no software WebGPU")
    assert "on WebGPU" in browser.evaluate(STATE)
    check_tokens(browser, student, 2)
