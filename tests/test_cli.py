import contextlib
import html
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import gracec as package
from gracec import cli, compiled, gates
from gracec.ir.program import Program
from gracec.passes import Pass, PassResult, all_passes
from gracec.recipe import Recipe
from tests.test_store import reseal
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
    assert json.loads(done.stdout)["report"]["gates"]["int4_kernels"]["count"] == 14
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
    streamed = gracec("run", workspace / "int4", *question)
    assert streamed.stdout.strip() == json.loads(compiled.stdout)["answer"]
    said = f"torchao runs the codes of {workspace / 'int4'}\n"
    assert compiled.stderr == streamed.stderr == said and original.stderr == ""
    assert gracec("run", workspace / "int4", *question, "-q").stderr == ""


def test_how_graphs_compute_is_chosen_on_the_command_line(workspace: Path) -> None:
    options = ("--format", "onnx", "--mode", "fast", "--ops", "qdq", "--json")
    done = gracec("compile", workspace / "model", "--out", workspace / "fast", *options)
    assert done.returncode == 0, done.stderr
    onnx = json.loads(done.stdout)["report"]["recipe"]["deploy"]["onnx"]
    assert (onnx["ops"], onnx["mode"]) == ("qdq", "fast")
    session = json.loads((workspace / "fast/onnx/session.json").read_text())
    assert (session["ops"], session["mode"]) == ("qdq", "fast") and "modes" not in session["gates"]
    asked = gracec("run", workspace / "fast", "--prompt", "what ?", "--max-new-tokens", 2)
    said = f"onnxruntime runs the graphs of {workspace / 'fast'}, mode fast; "
    assert asked.returncode == 0 and asked.stderr.startswith(said)


def talk(
    monkeypatch: pytest.MonkeyPatch, said: str, *arguments: object
) -> subprocess.CompletedProcess[str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    return gracec("run", *arguments, "--max-new-tokens", 4)


def test_run_talks_line_by_line(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "open_model", cache(compiled.open_model))
    image = workspace / "data/images/0.png"
    said = f"what is this ?\n\nand red ?\n/reset\n/image {image}\nwhat is this ?\n/quit\nno more\n"
    done = talk(monkeypatch, said, workspace / "int4", "--image", image, "--json")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["prompt"] for row in rows] == ["what is this ?", "and red ?", "what is this ?"]
    assert [row["images"] for row in rows] == [[str(image)], [], [str(image)]]
    assert rows[0]["answer"] == rows[2]["answer"] != rows[1]["answer"]
    plain = talk(monkeypatch, said, workspace / "int4", "--image", image)
    assert [line.strip() for line in plain.stdout.splitlines()] == [row["answer"] for row in rows]
    wrong = talk(monkeypatch, "/image no.png\nwhat ?\n", workspace / "int4")
    assert wrong.returncode == 2 and "no.png" in wrong.stderr and not wrong.stdout
    unknown = talk(monkeypatch, "/help\n", workspace / "int4")
    assert "unknown command '/help'; /image PATH adds a picture" in unknown.stderr


def test_a_person_is_told_what_is_wrong_and_goes_on(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("/image no.png\nwhat is red ?\n"))
    done = gracec("run", workspace / "int4", "--max-new-tokens", 4)
    assert done.returncode == 0
    assert "/image PATH adds a picture" in done.stderr and "no.png" in done.stderr
    assert done.stdout.strip()


def test_run_draws_and_follows_beams(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "open_model", cache(compiled.open_model))
    question = ("run", workspace / "int4", "--prompt", "what is red ?", "--max-new-tokens", 6)
    drawn = [gracec(*question, "--temperature", 5, "--seed", seed).stdout for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1
    plain = gracec(*question).stdout
    assert gracec(*question, "--temperature", 0, "--top-p", 0.5).stdout == plain
    beams = gracec(*question, "--num-beams", 3, "--system", "red", "--repetition-penalty", 3.0)
    assert beams.returncode == 0 and beams.stdout.strip() not in ("", plain.strip())


def test_version_help_quiet_and_verbose(workspace: Path, tmp_path: Path) -> None:
    assert gracec("--version").stdout.strip() == f"gracec {package.__version__}"
    for command in (
        "compile",
        "run",
        "eval",
        "inspect",
        "plan",
        "opt",
        "passes",
        "doctor",
        "report",
    ):
        shown = gracec(command, "-h").stdout
        assert "--quiet" in shown and "--verbose" in shown, command
    model = workspace / "model"
    verbose = gracec("opt", model, "--passes", "analyze-modality", "-v")
    assert re.search(r"^gracec: pass analyze-modality \d+\.\d\d s$", verbose.stderr, re.M)
    assert gracec("opt", model, "--passes", "analyze-modality", "-q").stderr == ""
    plain = gracec("opt", model, "--passes", "analyze-modality").stderr
    assert plain.startswith("analyze-modality: 2 decoder blocks")  # what was asked is not kept
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRACEC_CHECK_RELOAD", "0")
        ptq = ("--recipe", "w4a16-ptq", "--format", "none", "--out", tmp_path / "out")
        quiet = gracec("compile", model, *ptq, "--quiet")
    assert "".join(quiet.stdout.split()) == f"savedto{tmp_path / 'out'}"
    assert quiet.stderr == ""
    both = gracec("passes", "-q", "-v")
    assert both.returncode == 2 and "exclude each other" in both.stderr


@pytest.mark.slow
def test_eval_gives_every_control(workspace: Path) -> None:
    done = gracec("eval", workspace / "int4", "--data", workspace / "data", "--json")
    assert done.returncode == 0, done.stderr
    overall = json.loads(done.stdout)["overall"]
    assert overall["n"] == 3
    assert {"accuracy", "standard_error", "blind_accuracy", "majority", "chance"} <= overall.keys()
    table = gracec("eval", workspace / "int4", "--data", workspace / "data", "--limit", 2)
    assert "majority" in table.stdout
    lines = workspace / "data" / "samples.jsonl"
    as_data = gracec("eval", workspace / "int4", "--data", lines, "--json", "--no-blind")
    assert json.loads(as_data.stdout)["overall"]["accuracy"] == overall["accuracy"]
    assert json.loads(as_data.stdout)["skipped"] == []


def test_compile_trains_with_a_teacher_and_replaces_an_artifact(workspace: Path) -> None:
    recipe = workspace / "grace.yaml"
    training = "training: {steps: 2, batch_size: 2, held_out: 0.34, lr: 0.003}"
    recipe.write_text(f"weights: {{decoder: {{group_size: 32}}}}\n{training}\n")
    teach = ("--recipe", recipe, "--teacher", workspace / "model", "--data", workspace / "data")
    out = ("--out", workspace / "trained", "--format", "hf,torchao")
    done = gracec("compile", workspace / "model", *teach, *out, "--eval-data", workspace / "data")
    assert done.returncode == 0, done.stderr
    assert "training: trained 2 steps" in done.stdout
    assert "torchao: a code takes 8 bits on disk" in done.stdout
    assert "accuracy on 3 questions: original" in done.stdout
    assert "step 0/2 held out: loss" in done.stderr
    card = (workspace / "trained" / "README.md").read_text()
    assert "Exact match on data" in card
    assert "Trained for 2 optimizer steps, of which the state after step" in card
    assert (workspace / "trained" / "torchao" / "model.safetensors").is_file()
    again = gracec("compile", workspace / "model", "--out", workspace / "trained", "--overwrite")
    assert again.returncode == 0, again.stderr
    assert not (workspace / "trained" / "torchao").exists()
    assert not [path for path in workspace.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compile", "{root}/model", "--out", "x", "--format", "hff"), "did you mean 'hf'"),
        (("compile", "{root}/model", "--out", "{root}/data", "--overwrite"), "this is none"),
        (("compile", "{root}/model", "--out", "x", "--data", "{root}/no"), "{root}/no"),
        (("compile", "missing", "--out", "x"), "missing: no such model directory"),
        (("compile", "{root}/data", "--out", "x"), "no config.json, so this is no model"),
        (("compile", "{root}/model", "--out", "{root}/int4"), "the output directory exists"),
        (("compile", "{root}/model", "--out", "x", "--recipe", "w4"), "unknown recipe 'w4'"),
        (("compile", "{root}/model", "--out", "x", "--mode", "fast"), "--mode: no ONNX graphs are"),
        (
            ("compile", "{root}/model", "--out", "x", "--format", "onnx", "--mode", "x"),
            "deploy.onnx.mode: Input should be 'auto', 'fast' or 'faithful'",
        ),
        (("run", "{root}/int4", "--image", "{root}/no.png", "--prompt", "?"), "no.png"),
        (("eval", "{root}/int4", "--data", "{root}/model"), "samples.jsonl"),
        (("report", "{root}/model"), "gracec.json"),
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
    assert message.format(root=workspace) in lines[0]
    assert "Traceback" not in done.stderr


def test_a_failed_gate_is_exit_code_1(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gates.MATMUL_BOUND, torch.bfloat16, 1e-9)
    done = gracec("compile", workspace / "model", "--out", workspace / "never")
    assert done.returncode == 1
    assert "gracec: gate failed: " in done.stderr
    assert not (workspace / "never").exists()


def test_a_model_below_the_expected_accuracy_is_exit_code_1(workspace: Path) -> None:
    recipe = workspace / "gated.yaml"
    recipe.write_text("weights: {decoder: {group_size: 32}}\nexpect: {at_least: 1.0}\n")
    out = ("--out", workspace / "gated", "--recipe", recipe, "--eval-data", workspace / "data")
    done = gracec("compile", workspace / "model", *out)
    assert done.returncode == 1
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("gracec: "))
    assert "gate failed: accuracy is " in line and "gated.failed" in line
    assert not (workspace / "gated").exists()
    assert "Exact match on data" in (workspace / "gated.failed" / "README.md").read_text()


def test_report_writes_a_page_into_the_artifact(workspace: Path) -> None:
    asked = ("--data", workspace / "data", "--limit", 2)
    done = gracec("report", workspace / "int4", *asked)
    assert done.returncode == 0, done.stderr
    page = workspace / "int4" / "report.html"
    assert f"wrote {page}" in done.stdout
    assert "Asked for this page" in page.read_text(encoding="utf-8")


def test_it_is_a_program_of_its_own(workspace: Path) -> None:
    command = [sys.executable, "-m", "gracec", "run", str(workspace / "missing")]
    command += ["--image", "x.png", "--prompt", "?"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("gracec: ")
    assert "Traceback" not in done.stderr


PIPELINE = "analyze-modality,plan-quantization,insert-fake-quant{candidates=2}"


def test_opt_prints_the_program_at_the_end(workspace: Path) -> None:
    done = gracec("opt", workspace / "model", "--passes", PIPELINE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("program llava f32 cpu\n")
    assert done.stdout.count("gracec.fake_quantize(") == 14
    assert not any(line.endswith(" ") for line in done.stdout.splitlines())
    assert "insert-fake-quant: 14 weights fake-quantized" in done.stderr
    again = gracec("opt", workspace / "model", "--passes", PIPELINE)
    assert again.stdout == done.stdout


@pytest.mark.slow
def test_opt_prints_after_each_pass_or_what_it_changed(workspace: Path, tmp_path: Path) -> None:
    arguments = ("opt", workspace / "model", "--passes", f"{PIPELINE},insert-fake-quant")
    done = gracec(*arguments, "--print-before", "--print-after-all")
    headers = [line for line in done.stdout.splitlines() if line.startswith("// -----")]
    assert headers[0] == "// ----- captured -----"
    assert headers[1].startswith("// ----- after analyze-modality (modified): 2 decoder blocks")
    assert headers[3].startswith("// ----- after insert-fake-quant (modified): 14 weights")
    assert headers[4].startswith("// ----- after insert-fake-quant (unchanged)")
    assert done.stdout.count("program llava f32 cpu\n") == 5
    file = tmp_path / "changes.txt"
    done = gracec(*arguments, "--diff-after-all", "--out", file)
    assert done.stdout == ""
    *_, inserted, unchanged = file.read_text().split("// ----- after ")
    added = [line for line in inserted.splitlines() if line.startswith("+")]
    assert sum("gracec.fake_quantize(" in line for line in added) == 14
    assert unchanged.splitlines()[1:] in ([], [""])


def test_opt_leaves_passes_out(workspace: Path) -> None:
    model = workspace / "model"
    left = ("--disable-pass", "insert-fake-quant", "--disable-pass", "plan-quantization")
    done = gracec("opt", model, "--passes", PIPELINE, *left)
    assert done.returncode == 0, done.stderr
    assert done.stdout == gracec("opt", model, "--passes", "analyze-modality").stdout
    done = gracec("opt", model, "--passes", "strip", "--disable-pass", "strip", "--print-before")
    assert "// ----- after no pass -----" in done.stdout
    for name, message in (
        ("frieze", "gracec: unknown pass 'frieze'; did you mean 'freeze'?"),
        ("freeze", "freeze is not in the pipeline; known: analyze-modality, plan-quantization"),
    ):
        done = gracec("opt", model, "--passes", PIPELINE, "--disable-pass", name)
        assert done.returncode == 2 and message in done.stderr and done.stdout == ""


@pytest.mark.slow
def test_opt_says_what_each_pass_took_and_added(workspace: Path, tmp_path: Path) -> None:
    arguments = ("opt", workspace / "model", "--passes", f"{PIPELINE},freeze")
    done = gracec(*arguments, "--time", "--out", tmp_path / "program.txt")
    lines = [line for line in done.stderr.splitlines() if re.search(r" \d+\.\d\d s: ", line)]
    changes = [re.sub(r" \d+\.\d\d s", "", line) for line in lines]
    assert changes == [
        "analyze-modality: the same operators",
        "plan-quantization: the same operators",
        "insert-fake-quant: +14 gracec.fake_quantize",
        "freeze: +14 gracec.dequantize, -14 gracec.fake_quantize",
    ]
    assert " s: " not in gracec(*arguments).stderr


def test_opt_refuses_what_it_cannot_run(workspace: Path, tmp_path: Path) -> None:
    for model, passes, message in (
        ("model", "freeze", "freeze: nothing is fake-quantized; run insert-fake-quant first"),
        ("model", "frieze", "unknown pass 'frieze'; did you mean 'freeze'?"),
        ("int4", "freeze", "a gracec artifact, which is compiled already"),
    ):
        done = gracec("opt", workspace / model, "--passes", passes)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stdout == ""
    unwritable = tmp_path / "missing" / "file"
    done = gracec("opt", workspace / "model", "--passes", "strip", "--out", unwritable)
    assert done.returncode == 2
    assert "cannot be written" in done.stderr


def test_passes_lists_every_pass_with_its_options() -> None:
    done = gracec("passes")
    lines = done.stdout.splitlines()
    assert "freeze: turn trained weights and scales into integer codes" in lines
    place = lines.index("insert-fake-quant: simulate the planned quantization inside the graph")
    assert lines[place + 1] == "    {candidates=64 lowest=0.3 highest=1.2}"
    found = json.loads(gracec("passes", "--json").stdout)
    assert found.keys() == all_passes().keys()
    own = [name for name, cls in all_passes().items() if cls.__module__.startswith("gracec.")]
    assert len(own) >= 10 and all(found[name]["does"] for name in own)
    assert found["plan-quantization"]["options"] == {"recipe": "w4a16-ptq", "strict": False}
    assert found["apply-codes"]["options"] == {} and found["apply-codes"]["required"] == []
    assert found["freeze"]["from"] == "gracec.passes.freeze"


@dataclass(frozen=True)
class Stranger(Pass):
    """Comes from elsewhere, with options of every kind."""

    count: int
    blocks: tuple[int, ...] = (0, 3)
    limit: int | None = None
    recipe: str | Recipe = field(default_factory=lambda: Recipe.load("w4a16"))
    name: ClassVar[str] = "stranger"
    keeps_numerics: ClassVar[bool] = True

    def apply(self, program: Program) -> PassResult:
        return PassResult(program, False)


def test_passes_says_where_a_strangers_pass_comes_from_and_what_it_needs() -> None:
    lines = gracec("passes").stdout.splitlines()
    does = "Comes from elsewhere, with options of every kind"
    place = lines.index(f"stranger: {does} (from {__name__})")
    assert lines[place + 1] == "    {count=<int> blocks=0;3 limit=none recipe=<...>}"
    assert not any("(from gracec" in line for line in lines)
    assert json.loads(gracec("passes", "--json").stdout)["stranger"] == {
        "does": does,
        "from": __name__,
        "options": {"blocks": [0, 3], "limit": None, "recipe": "<...>"},
        "required": ["count"],
    }


def test_inspect_shows_parts_plan_and_memory(workspace: Path, tmp_path: Path) -> None:
    model, picture = workspace / "model", tmp_path / "parts.svg"
    done = gracec("inspect", model, "--picture", picture)
    assert done.returncode == 0, done.stderr
    for text in ("projector", "group 128 does not divide 64", "KV cache", "highest point"):
        assert text in done.stdout
    assert "decoder, 2 blocks" in picture.read_text()
    shape = ("--batch", 2, "--text", 10, "--images", 2)
    found = json.loads(gracec("inspect", model, *shape, "--json").stdout)
    written = len("<s> USER :".split())  # by the chat template
    assert found["memory"]["tokens"] == 10 + 2 * 16 + written
    assert found["memory"]["logits"]["float32"] == 2 * (42 + written) * 128 * 4
    assert found["training"] is None
    assert found["memory"]["compile_peak"] > found["memory"]["weights"]["stored"]


def test_plan_says_what_a_training_takes(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((workspace / "model" / "config.json").read_bytes())
    shape = ("--picture", "64x64", "--text", 20, "--answer", 8, "--memory-per-device", "24GiB")
    recipe = ("--recipe", "w4a16-qat")  # without a teacher
    done = gracec("plan", tmp_path, *recipe, *shape)
    assert done.returncode == 0, done.stderr
    for text in ("masters", "which fits", "seconds a step", "micro_batch_size: 16", "25.8 GB"):
        assert text in done.stdout
    wrong = gracec("plan", tmp_path, "--picture", "large")
    assert wrong.returncode == 2
    assert wrong.stderr == "gracec: picture: 'large' is no size; write 640x480\n"


def test_inspect_shows_the_report_of_an_artifact(workspace: Path, tmp_path: Path) -> None:
    done = gracec("inspect", workspace / "int4", "--picture", tmp_path / "parts.svg")
    assert done.returncode == 0, done.stderr
    for text in ("SQNR dB", "int4/g64", "matmul error", "less than bfloat16"):
        assert text in done.stdout
    assert "99.6% quantized" in (tmp_path / "parts.svg").read_text()
    report = json.loads(gracec("inspect", workspace / "int4", "--json").stdout)["report"]
    assert len([row for row in report["plan"] if row.get("sqnr_db", 0) > 10]) == 14


def test_inspect_shows_what_correcting_codes_was_worth(workspace: Path, tmp_path: Path) -> None:
    shutil.copytree(workspace / "int4", tmp_path / "int4")
    report = json.loads((tmp_path / "int4/gracec.json").read_text())["report"]
    quantized = [row for row in report["plan"] if row["spec"] is not None]
    for row in quantized:
        row |= {"output_error": [0.04, 0.03, 0.01], "codes": "corrected"}
    reseal(tmp_path / "int4", report=report)
    done = gracec("inspect", tmp_path / "int4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("0.04 ") == len(quantized) and "plain error" in done.stdout
    line = "median 0.25 of plain rounding's, worst 0.25"
    assert line in done.stdout
    assert gracec("report", tmp_path / "int4").returncode == 0
    assert line in html.unescape((tmp_path / "int4/report.html").read_text())


def test_doctor_prints_a_line_for_each_check(workspace: Path) -> None:
    done = gracec("doctor", workspace / "model")
    assert done.returncode == 0, done.stdout
    *checks, verdict = done.stdout.splitlines()
    assert verdict == "gracec can compile it"
    assert checks[0].startswith("ok       directory: ")
    done = gracec("doctor", workspace / "data", "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["compiles"] is False
    assert found["checks"][0]["status"] == "blocked"
    assert gracec("doctor", workspace / "model", "--recipe", "w5").returncode == 2


def in_bytes(*arguments: object) -> tuple[int, str, str]:
    """Exit code and both streams of a command, encoded as those of a terminal are."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
    before, code = sys.argv, 0
    sys.argv = ["gracec", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = before
    for stream in streams:
        stream.flush()
    out, err = (stream.buffer.getvalue().decode() for stream in streams)  # type: ignore[attr-defined]
    return code, out, err


def test_a_path_that_no_encoding_holds_is_printed_escaped(workspace: Path, tmp_path: Path) -> None:
    odd = tmp_path / "int4-\udc80"
    shutil.copytree(workspace / "int4", odd)
    manifest = json.loads((odd / "gracec.json").read_text())
    manifest["source"] = "model-\udc80"
    manifest["report"]["notes"].append({"source": "", "text": "of model-\udc80"})
    reseal(odd, **{name: manifest[name] for name in ("source", "report")})
    code, out, err = in_bytes("inspect", odd)
    assert (code, err) == (0, "") and "of model-\\udc80" in out
    code, out, err = in_bytes("report", odd)
    assert (code, err) == (0, "") and "int4-\\udc80/report.html" in out
    assert "of model-\\udc80" in (odd / "report.html").read_text()
    code, out, err = in_bytes("inspect", tmp_path / "none-\udc80")
    assert code == 2 and "none-\\udc80" in err and "Traceback" not in err


def test_what_opt_writes_is_whole_or_not_there(tmp_path: Path) -> None:
    """As where a pass fails after the first was printed, or the disk is full."""
    file = tmp_path / "program.txt"
    file.write_text("of before")

    def fail() -> None:
        with cli.graphs._destination(file) as write:
            write("half of it")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert file.read_text() == "of before"
    with cli.graphs._destination(file) as write:
        write("all of it\n")
    assert file.read_text() == "all of it\n"
    assert list(tmp_path.iterdir()) == [file]


def test_the_demo_writes_over_nothing(tmp_path: Path) -> None:
    (tmp_path / "out" / "data").mkdir(parents=True)
    (tmp_path / "out" / "data" / "thesis.tex").write_text("years")
    example = Path(__file__).parents[1] / "examples/emojivqa"
    done = gracec("demo", "--example", example, "--out", tmp_path / "out")
    assert done.returncode == 2 and "data: it exists, and the demo would write there" in done.stderr
    assert (tmp_path / "out" / "data" / "thesis.tex").read_text() == "years"
