import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import gracec
from gracec.data.prompts import encode_questions
from gracec.evaluate import load_image
from gracec.models.loading import load_processor
from tests.examples.conftest import NEW_TOKENS, ROOT, Tried
from tests.npm import install
from tests.tiny import tiny_image
from tests.transformers_js import NODE, SECONDS


@pytest.fixture(scope="session", autouse=True)
def _programs() -> None:
    install(NODE)


def node(*arguments: object, lines: str = "") -> subprocess.CompletedProcess[str]:
    command = ["node", str(NODE / "answer.mjs"), *map(str, arguments)]
    return subprocess.run(
        command, input=lines, capture_output=True, text=True, timeout=SECONDS, check=False
    )


def check_tokens(tried: Tried) -> None:
    lines = [{"image": str(one.image), "question": one.question} for one in tried.asked]
    text = "\n".join(map(json.dumps, lines))
    done = node(tried.directory, "--json", "--max-new-tokens", NEW_TOKENS, lines=text)
    assert done.returncode == 0, done.stderr
    loaded, *answers = map(json.loads, done.stdout.splitlines())
    assert loaded["load"] > 0
    assert [answer["tokens"] for answer in answers] == [one.tokens for one in tried.asked]


def test_the_tokens_are_those_of_python(tiny: Tried) -> None:
    assert len({tuple(one.tokens) for one in tiny.asked}) > 2
    check_tokens(tiny)


def test_negative_scales(signed: Tried) -> None:
    weights = gracec.load(signed.directory, target="torchao").weights.values()
    assert all(2 * (one.scales < 0).sum() == one.scales.numel() for one in weights)
    check_tokens(signed)


def test_tensors_in_files_of_their_own(exported: Path, tiny: Tried) -> None:
    """The same weights as `tiny`, in standard operators: the options of the session count."""
    check_tokens(Tried(exported, tiny.asked))


@pytest.mark.slow
def test_the_shipped_student_on_twenty_questions(student: Tried) -> None:
    assert len(student.asked) == 20
    check_tokens(student)


def test_one_answer_is_printed(tiny: Tried) -> None:
    one = tiny.asked[0]
    done = node(
        tiny.directory, "--image", one.image, "--prompt", one.question, "--max-new-tokens", 4
    )
    assert (done.returncode, done.stderr) == (0, "")
    text = load_processor(tiny.directory).decode(one.tokens[:4], skip_special_tokens=True)
    assert done.stdout.split() == text.split() != []


def test_a_question_without_an_image(tiny: Tried) -> None:
    model = gracec.load(tiny.directory, backend="onnx")
    message = {"role": "user", "content": [{"type": "text", "text": "what is this ?"}]}
    inputs = model.processor.apply_chat_template(
        [message],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    tokens = model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
    done = node(tiny.directory, "--prompt", "what is this ?", "--max-new-tokens", 4)
    assert (done.returncode, done.stderr) == (0, "")
    text = model.processor.decode(tokens, skip_special_tokens=True)
    assert done.stdout.split() == text.split() != []


def test_what_is_transparent_is_white(tiny: Tried, tmp_path: Path) -> None:
    """As in Python, to the same tokens; without the transparency they would be others."""
    model = gracec.load(tiny.directory, backend="onnx")
    opaque = tiny_image(4).convert("RGBA")
    opaque.save(tmp_path / "opaque.png")
    opaque.putalpha(tiny_image(9).convert("L"))
    opaque.save(tmp_path / "it.png")
    seen = []
    for name in ("it", "opaque"):
        asked = encode_questions(
            model.processor, ["what is this ?"], [load_image(tmp_path / f"{name}.png")]
        )
        tokens = model.generate(**asked, max_new_tokens=NEW_TOKENS)
        seen.append(tokens[0, asked["input_ids"].shape[1] :].tolist())
    assert seen[0] != seen[1]
    line = json.dumps({"image": str(tmp_path / "it.png"), "question": "what is this ?"})
    done = node(tiny.directory, "--json", "--max-new-tokens", NEW_TOKENS, lines=line)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[1])["tokens"] == seen[0]


def test_mistakes_are_one_line(tiny: Tried, tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("no picture")
    (tmp_path / "empty").mkdir()
    for arguments, message in {
        (): "usage: node answer.mjs DIR",
        (tiny.directory, "--json", "--max-new-tokens", "none"): "usage: node answer.mjs DIR",
        (tiny.directory, "--pictures"): "Unknown option '--pictures'",
        (tmp_path / "empty", "--json"): r"session\.json is missing: compile with --format onnx",
        (tiny.directory, "--image", text, "--prompt", "x"): "cannot be read as an image",
        (tiny.directory, "--image", tmp_path / "no.png", "--prompt", "x"): "cannot be read",
    }.items():
        done = node(*arguments)
        assert done.returncode == 2
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert re.match(f"answer.mjs: .*{message}", line), line


def test_without_the_packages_it_says_what_to_run(tiny: Tried, tmp_path: Path) -> None:
    shutil.copy(NODE / "answer.mjs", tmp_path)
    command = ["node", tmp_path / "answer.mjs", tiny.directory, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 2
    assert f"run npm ci in {tmp_path}" in done.stderr


@pytest.mark.parametrize("example", ["node", "browser"])
def test_the_lock_file_names_no_registry(example: str) -> None:
    lock = json.loads((ROOT / "examples" / example / "package-lock.json").read_text())
    packages = {name: entry for name, entry in lock["packages"].items() if name}
    assert packages
    for name, entry in packages.items():
        assert entry["integrity"].startswith("sha512-"), name
        assert "resolved" not in entry, name
