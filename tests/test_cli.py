import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gracec import cli, gates
from tests.tiny import tiny_image, tiny_llava, tiny_processor


def gracec(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, which saves importing torch each time."""
    before, code = sys.argv, 0
    stdout, stderr = io.StringIO(), io.StringIO()
    sys.argv = ["gracec", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = before
    return subprocess.CompletedProcess(arguments, code, stdout.getvalue(), stderr.getvalue())


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory, its compiled artifact, a picture and three questions."""
    root = tmp_path_factory.mktemp("cli")
    tiny_llava(tie=True).save_pretrained(root / "model")
    tiny_processor().save_pretrained(root / "model")
    (root / "data" / "images").mkdir(parents=True)
    samples = []
    for number in range(3):
        tiny_image(number).save(root / "data" / "images" / f"{number}.png")
        samples.append(
            {"image": f"images/{number}.png", "question": "what is this ?", "answer": "red"}
        )
    (root / "data" / "samples.jsonl").write_text("\n".join(map(json.dumps, samples)))
    done = gracec("compile", root / "model", "--out", root / "int4", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["report"]["gates"]["int4_kernels"] == 14
    return root


def test_run_answers_from_both_kinds_of_directory(workspace: Path) -> None:
    image = workspace / "data/images/0.png"
    question = ("--image", image, "--prompt", "what is this ?", "--max-new-tokens", 4)
    compiled = gracec("run", workspace / "int4", *question, "--json")
    assert compiled.returncode == 0, compiled.stderr
    assert json.loads(compiled.stdout)["answer"]
    original = gracec("run", workspace / "model", *question)
    assert original.returncode == 0, original.stderr
    assert original.stdout.strip()


def test_eval_gives_every_control(workspace: Path) -> None:
    done = gracec("eval", workspace / "int4", "--data", workspace / "data", "--json")
    assert done.returncode == 0, done.stderr
    overall = json.loads(done.stdout)["overall"]
    assert overall["n"] == 3
    assert {"accuracy", "standard_error", "blind_accuracy", "majority", "chance"} <= overall.keys()
    table = gracec("eval", workspace / "int4", "--data", workspace / "data", "--limit", 2)
    assert "majority" in table.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compile", "missing", "--out", "x"), "missing: no such model directory"),
        (("compile", "{root}/data", "--out", "x"), "no config.json, so this is no model"),
        (("compile", "{root}/model", "--out", "{root}/int4"), "the output directory exists"),
        (("compile", "{root}/model", "--out", "x", "--recipe", "w4"), "unknown recipe 'w4'"),
        (("run", "{root}/int4", "--image", "{root}/no.png", "--prompt", "?"), "no.png"),
        (("eval", "{root}/int4", "--data", "{root}/model"), "samples.jsonl"),
        (("demo", "--example", "{root}"), "teacher is missing"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    workspace: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = gracec(*(text.format(root=workspace) for text in arguments))
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("gracec: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in done.stderr


def test_a_failed_gate_is_exit_code_1(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gates.MATMUL_BOUND, torch.bfloat16, 1e-9)
    done = gracec("compile", workspace / "model", "--out", workspace / "never")
    assert done.returncode == 1
    assert "gracec: gate failed: " in done.stderr
    assert not (workspace / "never").exists()


def test_it_is_a_program_of_its_own(workspace: Path) -> None:
    command = [sys.executable, "-m", "gracec.cli", "run", str(workspace / "missing")]
    command += ["--image", "x.png", "--prompt", "?"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("gracec: ")
    assert "Traceback" not in done.stderr
