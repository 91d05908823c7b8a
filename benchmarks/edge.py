"""How fast the shipped student answers in Python, in Node and in a browser, and what they load.

    python benchmarks/edge.py [--rounds 5]

Needs node, npm and chromium. Each client is started anew in every round, one after another, with
its default settings, and asked the same questions one at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measure import write_result

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
EXAMPLES = ROOT / "examples"
QUESTIONS, NEW_TOKENS = 20, 24
ENLARGED = 160
"""Pixels a side of pictures that each client resizes with code of its own."""

Answer = dict[str, Any]
Question = tuple[Path, str]


class Times:
    """A streamer: when the prompt and each token came."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def put(self, tokens: Any) -> None:
        self.seen.append(time.perf_counter())

    def end(self) -> None: ...


def answer_in_python(directory: Path) -> None:
    """What `answer.mjs --json` does, with ONNX Runtime in Python."""
    import gracec
    from gracec.data.prompts import encode_questions
    from gracec.evaluate import load_image

    model = gracec.load(directory, backend="onnx")
    processor = model.processor
    print(json.dumps({"threads": model.threads}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        started = time.perf_counter()
        inputs = encode_questions(
            processor, [asked["question"]], [load_image(Path(asked["image"]))]
        )
        times = Times()
        made = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, streamer=times)
        seconds = time.perf_counter() - started
        tokens = made[0, inputs["input_ids"].shape[1] :].tolist()
        first = times.seen[1] - started  # after the prompt
        found = {"tokens": tokens, "first": 1000 * first, "milliseconds": 1000 * seconds}
        print(json.dumps(found), flush=True)


def in_a_process(
    command: Sequence[str], questions: Sequence[Question]
) -> tuple[float, list[Answer]]:
    """Seconds until a client is ready, and its answers."""
    started = time.perf_counter()
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.readline()
    ready = time.perf_counter() - started
    answers = []
    for image, question in questions:
        process.stdin.write(json.dumps({"image": str(image), "question": question}) + "\n")
        process.stdin.flush()
        answers.append(json.loads(process.stdout.readline()))
    process.stdin.close()
    process.wait()
    return ready, answers


def in_python(directory: Path, questions: Sequence[Question]) -> tuple[float, list[Answer]]:
    return in_a_process([sys.executable, __file__, "--answer", str(directory)], questions)


def in_node(directory: Path, questions: Sequence[Question]) -> tuple[float, list[Answer]]:
    script = str(EXAMPLES / "node/answer.mjs")
    limit = str(NEW_TOKENS)
    return in_a_process(
        ["node", script, str(directory), "--json", "--max-new-tokens", limit], questions
    )


def in_chromium(directory: Path, questions: Sequence[Question]) -> tuple[float, list[Answer]]:
    """The same from the page; it is ready when it says so."""
    with page(directory) as (browser, url):
        started = time.perf_counter()
        browser.open(url)
        browser.wait_for("/Loaded in/.test(document.querySelector('#state')?.textContent)", 300)
        ready = time.perf_counter() - started
        answers = []
        for image, question in questions:
            shown = f"document.querySelector('#shown').alt === '{image.name}'"
            browser.choose_file("#file", image)
            browser.wait_for(f"{shown} && !document.querySelector('#send').disabled")
            browser.evaluate(f"document.querySelector('#question').value = {question!r}")
            browser.evaluate("document.querySelector('#ask').requestSubmit()")
            count = "document.querySelectorAll('#answers li[data-tokens]').length"
            browser.wait_for(f"{count} > {len(answers)}")
            found = browser.evaluate("({...document.querySelector('#answers li').dataset})")
            answers.append(
                {
                    "tokens": [int(token) for token in found["tokens"].split()],
                    "first": float(found["first"]),
                    "milliseconds": float(found["milliseconds"]),
                }
            )
    return ready, answers


@contextmanager
def page(directory: Path) -> Iterator[tuple[Any, str]]:
    from gracec.serve import Server
    from tests.chromium import Browser

    with Server(directory, EXAMPLES / "browser", port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            browser = Browser(Path(profile))
            try:
                yield browser, server.url
            finally:
                browser.close()
                server.shutdown()


Client = Callable[[Path, Sequence[Question]], tuple[float, list[Answer]]]
CLIENTS: dict[str, tuple[Client, str]] = {
    "Python": (in_python, "CPU"),
    "Node": (in_node, "CPU"),
    "Chromium": (in_chromium, "WebAssembly"),
}


def measure(directory: Path, questions: Sequence[Question], rounds: int) -> list[dict[str, Any]]:
    """A row for each client: medians over the rounds, with the least and the greatest."""
    found: dict[str, list[tuple[float, list[Answer]]]] = {name: [] for name in CLIENTS}
    for number in range(rounds):
        for name, (client, _) in CLIENTS.items():
            found[name].append(client(directory, questions))
            print(f"round {number + 1}: {name} ready after {found[name][-1][0]:.1f} s")
    expected = [answer["tokens"] for answer in found["Python"][0][1]]
    rows = []
    for name, (_, provider) in CLIENTS.items():
        ready = [seconds for seconds, _ in found[name]]
        first = [statistics.median(a["first"] for a in answers) for _, answers in found[name]]
        rate = [tokens_per_second(answers) for _, answers in found[name]]
        same = [
            [a["tokens"] == right for a, right in zip(answers, expected, strict=True)]
            for _, answers in found[name]
        ]
        exact, resized = (
            min(sum(one[part]) for one in same)
            for part in (slice(QUESTIONS), slice(QUESTIONS, None))
        )
        rows.append(
            {
                "client": name,
                "provider": provider,
                "start_s": spread(ready, 1),
                "first_token_ms": spread(first, 0),
                "tokens_per_s": spread(rate, 0),
                "tokens_as_in_python": f"{exact} of {QUESTIONS}",
                "with_resized_pictures": f"{resized} of {QUESTIONS}",
            }
        )
    return rows


def tokens_per_second(answers: Sequence[Answer]) -> float:
    """Over all answers, without the first token of each, which waits for the prompt."""
    tokens = sum(len(answer["tokens"]) - 1 for answer in answers)
    return 1000 * tokens / sum(answer["milliseconds"] - answer["first"] for answer in answers)


def spread(values: Sequence[float], digits: int) -> str:
    median, least, greatest = statistics.median(values), min(values), max(values)
    return f"{median:.{digits}f} ({least:.{digits}f} to {greatest:.{digits}f})"


def enlarged(image: Path) -> Path:
    """A larger copy of a picture, beside it."""
    from PIL import Image

    path = image.with_name(f"{image.stem}-{ENLARGED}.png")
    with Image.open(image) as picture:
        picture.resize((ENLARGED, ENLARGED), Image.Resampling.LANCZOS).save(path)
    return path


def sizes(directory: Path) -> list[dict[str, Any]]:
    """What lies in the directory, and what each client brings along."""
    browser = EXAMPLES / "browser/node_modules"
    runtime = browser / "onnxruntime-web/dist"
    parts = {
        "model.safetensors": ("transformers", [directory / "model.safetensors"]),
        "gracec/": ("gracec", [*(directory / "gracec").iterdir()]),
        **{
            f"onnx/{file.name}": ("ONNX Runtime in Python, Node and browsers", [file])
            for file in sorted((directory / "onnx").glob("*.onnx*"))
        },
        "transformers.min.js": (
            "browsers",
            [browser / "@huggingface/transformers/dist/transformers.min.js"],
        ),
        "onnxruntime-web": ("browsers", [*runtime.glob("ort-wasm-simd-threaded.asyncify.*")]),
    }
    return [
        {"part": part, "read_by": reader, "kib": round(sum(f.stat().st_size for f in files) / 1024)}
        for part, (reader, files) in parts.items()
    ]


def versions() -> dict[str, str]:
    import onnxruntime

    from tests.chromium import CHROMIUM

    found = {"onnxruntime": onnxruntime.__version__}
    for package in ("@huggingface/transformers", "onnxruntime-node", "onnxruntime-web"):
        path = EXAMPLES / "browser/node_modules" / package / "package.json"
        found[package] = json.loads(path.read_text(encoding="utf-8"))["version"]
    for name, command in {"node": "node", "chromium": CHROMIUM}.items():
        done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
        found[name] = done.stdout.strip().removeprefix("v").removeprefix("Chromium ").split()[0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.answer:
        answer_in_python(arguments.answer)
        return
    import gracec
    from gracec.demo import write_questions
    from gracec.evaluate import load_samples

    load = os.getloadavg()[0]
    for example in ("node", "browser"):
        if not (EXAMPLES / example / "node_modules").is_dir():
            subprocess.run(["npm", "ci"], cwd=EXAMPLES / example, check=True)
    with tempfile.TemporaryDirectory() as folder:
        directory, data = Path(folder) / "model", Path(folder) / "data"
        compiled = gracec.compile(EXAMPLES / "emojivqa/student", "w4a16-ptq")
        compiled.save_pretrained(directory, "hf,onnx")
        write_questions(EXAMPLES / "emojivqa", "test", data, QUESTIONS)
        questions = [(sample.image, sample.question) for sample in load_samples(data)]
        questions += [(enlarged(image), question) for image, question in questions]
        rows = measure(directory, questions, arguments.rounds) + sizes(directory)
    write_result(
        "edge",
        f"The shipped student in INT4: {QUESTIONS} questions, and again with enlarged pictures, "
        f"{arguments.rounds} rounds in turn; median (least to greatest)",
        rows,
        load=load,
        versions=versions(),
    )


if __name__ == "__main__":
    main()
