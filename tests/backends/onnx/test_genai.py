import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from gracec.backends.onnx import genai
from gracec.backends.onnx.format import Onnx
from gracec.backends.onnx.graphs import EXTERNAL_FROM
from gracec.errors import GateError
from gracec.frozen import Frozen
from gracec.models.loading import load_processor
from gracec.models.skeleton import without_weights
from gracec.quant import QuantSpec
from tests.backends.artifacts import decoder_specs, random_artifact
from tests.docs.fences import fences
from tests.genai import IMAGE, Question, ask, expected, needed, run, why_not
from tests.tiny import tiny_image
from tests.tiny_families import tiny_model, tiny_processor, tokenizer


@pytest.fixture(scope="module")
def artifact() -> Frozen:
    """Not to be changed by a test. Its tower takes pictures of 1,024 to 2,304 pixels; half of its
    scales are negative."""
    return random_artifact(
        decoder_specs(QuantSpec(group_size=32, signed=True)),
        model=tiny_model("qwen2_vl"),
        processor=tiny_processor("qwen2_vl"),
        dtype=torch.float32,
    )


@pytest.fixture(scope="module")
def directory(artifact: Frozen, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `--format onnx` writes. Not to be changed by a test."""
    return write(artifact, tmp_path_factory.mktemp("genai") / "DIR", Onnx())


def write(artifact: Frozen, folder: Path, form: Onnx) -> Path:
    artifact.config.save_pretrained(folder)
    assert artifact.generation_config is not None
    artifact.generation_config.save_pretrained(folder)
    notes = form.write(artifact, folder / "onnx")
    assert not [note for note in notes if "genai" in note]
    form.finish(artifact, folder)
    form.seal(folder)
    return folder


def noise(path: Path, width: int, height: int, mode: str = "RGB") -> Path:
    """A picture on which every filter and every mistake shows."""
    draw = np.random.default_rng(width * height)
    pixels = draw.integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    Image.fromarray(pixels.squeeze(), mode).save(path)
    return path


def changed(artifact: Frozen, **fields: Any) -> Frozen:
    """An artifact whose image processor has other settings."""
    processor = tiny_processor("qwen2_vl")
    for name, value in fields.items():
        setattr(processor.image_processor, name, value)
    return replace(artifact, processor=processor)


def test_genai_answers_as_onnx_runtime_does(directory: Path, tmp_path: Path) -> None:
    """From the files of pictures on: its own tokenizer, image processor, positions and cache."""
    needed()
    fits, wide = noise(tmp_path / "a.png", 48, 32), noise(tmp_path / "b.png", 83, 61)
    questions: list[Question] = [
        (f"{IMAGE}what is this ?", [fits]),
        (f"{IMAGE}what is this ?", [wide]),
        (f"look at {IMAGE}and at {IMAGE}: which is red ?", [wide, fits]),
        (f"look at {IMAGE}and at {IMAGE}: which is red ?", [fits, fits]),
        ("is there no picture ?", []),
    ]
    found, wanted = ask(directory, questions), expected(directory, questions)
    assert [one.prompt for one in found] == [one.prompt for one in wanted]
    assert [one.image_grid_thw for one in found] == [one.image_grid_thw for one in wanted]
    assert [one.answer for one in found] == [one.answer for one in wanted]
    assert len({tuple(one.answer) for one in found}) > 3


@pytest.mark.slow
def test_standard_operators_with_the_option_of_their_sessions(
    artifact: Frozen, tmp_path: Path
) -> None:
    needed()
    directory = write(artifact, tmp_path / "DIR", Onnx("qdq"))
    config = json.loads((directory / "genai_config.json").read_text())["model"]
    options = config["decoder"]["session_options"]
    assert options["session.qdq_matmulnbits_accuracy_level"] == "1"
    questions: list[Question] = [(f"{IMAGE}what ?", [noise(tmp_path / "a.png", 48, 32)])]
    assert ask(directory, questions)[0].answer == expected(directory, questions)[0].answer


def test_pixels_are_those_of_transformers(directory: Path, tmp_path: Path) -> None:
    """Of PNG files, with and without a resize; JPEG files are decoded by another library, and a
    side half way between two sizes goes up."""
    needed()
    files = {
        "as it is": noise(tmp_path / "1.png", 48, 32),
        "larger": noise(tmp_path / "2.png", 30, 20),
        "smaller": noise(tmp_path / "3.png", 300, 200),
        "gray": noise(tmp_path / "4.png", 48, 32, "L"),
        "transparent": noise(tmp_path / "5.png", 48, 32, "RGBA"),
    }
    opaque = tmp_path / "opaque.png"
    Image.open(files["transparent"]).convert("RGB").save(opaque)
    tiny_image(0, (48, 32)).save(tmp_path / "6.jpg", quality=95)
    files["jpeg"] = tmp_path / "6.jpg"
    files["half way"] = noise(tmp_path / "7.png", 40, 40)
    questions: list[Question] = [(IMAGE, [file]) for file in files.values()]
    pairs = zip(ask(directory, questions), expected(directory, questions), strict=True)
    for what, (found, wanted) in zip(files, pairs, strict=True):
        if what == "half way":  # 2.5 tokens of 16 pixels
            grids = [found.image_grid_thw, wanted.image_grid_thw]
            assert grids == [[[1, 6, 6]], [[1, 4, 4]]]
            continue
        assert found.image_grid_thw == wanted.image_grid_thw, what
        if what == "transparent":  # its colours are taken as if it were not
            assert not np.allclose(found.pixel_values, wanted.pixel_values)
            wanted = expected(directory, [(IMAGE, [opaque])])[0]
        off = np.abs(np.array(found.pixel_values) - np.array(wanted.pixel_values))
        assert off.mean() < 0.1 if what == "jpeg" else off.max() < 1e-6, what


def test_the_lines_of_the_page(directory: Path, tmp_path: Path) -> None:
    needed()
    (block,) = (block for block in fences("edge.md") if "onnxruntime_genai" in block.text)
    (tmp_path / "DIR").symlink_to(directory)
    picture = noise(tmp_path / "picture.png", 48, 32)
    printed = run(block.text, cwd=tmp_path)
    processor = load_processor(directory)
    content = [{"type": "image"}, {"type": "text", "text": "Where is the cat?"}]
    message = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(message, add_generation_prompt=True)
    (wanted,) = expected(directory, [(prompt, [picture])])
    text = processor.decode(wanted.answer, skip_special_tokens=True)
    assert text and printed.startswith(text)


def test_graphs_share_the_weights(directory: Path) -> None:
    """Every tensor of some size lies in the data file of the graph that other clients run."""
    graphs = json.loads((directory / "onnx/session.json").read_text())["graphs"]
    config = json.loads((directory / "genai_config.json").read_text())["model"]
    assert config["type"] == "qwen2_5_vl"
    parts = {"vision_encoder": "vision", "embed_tokens": "embedding", "decoder": "decoder"}
    for name, part in parts.items():
        data = f"{graphs[name]}_data"
        paths = [directory / config[part]["filename"], directory / "onnx" / graphs[name]]
        stored = []
        for path in paths:
            shallow = onnx.load(str(path), load_external_data=False).graph.initializer
            external = [tensor for tensor in shallow if tensor.external_data]
            stored.append({t.name: {e.key: e.value for e in t.external_data} for t in external})
            assert max(len(t.raw_data) for t in shallow) <= EXTERNAL_FROM, path.name
        assert stored[0] == stored[1]
        assert {entry["location"] for entry in stored[0].values()} == {data}
    assert (directory / "onnx/vision_encoder.onnx_data").stat().st_size > 65536
    fields = json.loads((directory / "config.json").read_text())["transformers.js_config"]
    assert set(fields["use_external_data_format"]) == set(graphs.values())


def test_a_graph_that_computes_something_else_is_an_error(directory: Path) -> None:
    session = json.loads((directory / "onnx/session.json").read_text())
    files = {name: directory / "onnx" / file for name, file in session["graphs"].items()}
    headers = {name: directory / "onnx" / file for name, file in genai.HEADERS.items()}
    model = tiny_model("qwen2_vl")
    genai._check(model, files, headers, {})
    model.config.image_token_id = 7  # the graph has another one
    with pytest.raises(GateError, match=r"genai_embedding.onnx.*else than embed_tokens.onnx"):
        genai._check(model, files, headers, {})


def other_image_token(graph: Any, config: Any) -> None:
    """Merges the rows of an image into the places of another token."""
    odd = copy.deepcopy(config)
    odd.image_token_id = 7
    MERGE(graph, odd)


def misspelt(graph: Any, config: Any) -> None:
    MERGE(graph, config)
    next(node for node in graph if node.op_type == "CumSum").op_type = "CumSumm"


MERGE = genai._merge_features


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        (other_image_token, "genai_embedding.onnx: computes something else than embed_tokens"),
        (misspelt, "genai_embedding.onnx: not valid ONNX"),
    ],
)
def test_every_header_is_looked_at(
    merge: Any, message: str, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(directory / "onnx", tmp_path / "onnx"))
    session = json.loads((folder / "session.json").read_text())
    files = {name: folder / file for name, file in session["graphs"].items()}
    genai.write_headers(tiny_model("qwen2_vl"), files, {})
    monkeypatch.setattr(genai, "_merge_features", merge)
    with pytest.raises(GateError, match=message):
        genai.write_headers(tiny_model("qwen2_vl"), files, {})


def test_pictures_are_as_large_as_the_graph_takes(artifact: Frozen) -> None:
    large = changed(artifact, size={"shortest_edge": 1024, "longest_edge": 1 << 30})
    assert genai.max_pixels(large) == 8192 * 8 * 8
    (note,) = genai.notes(large)
    assert note.startswith("onnxruntime-genai: images are scaled down to 524,288 pixels, not 1,073")
    assert genai.max_pixels(artifact) == 48 * 48
    assert genai.notes(artifact) == []


def test_what_genai_would_read_differently_is_not_written(artifact: Frozen) -> None:
    assert genai.refusal(artifact) == ""
    words = changed(artifact)
    words.processor.tokenizer = tokenizer()
    reasons = {
        "there is no processor": replace(artifact, processor=None),
        "its processor does what do_normalize turns off": changed(artifact, do_normalize=False),
        "its processor has no filter 4": changed(artifact, resample=4),
        "its processor writes <|image_pad|>, which is not the image_token_id of the": words,
    }
    for reason, odd in reasons.items():
        assert genai.refusal(odd).startswith(reason)
        (note,) = genai.notes(odd)
        assert note.startswith(f"onnxruntime-genai: no genai_config.json: {reason}")
    llava = random_artifact({})
    assert genai.refusal(llava) == "it has no model type for 'llava'"
    assert genai.notes(llava) == []


@pytest.mark.parametrize("family", ["llava", "idefics3", "smolvlm"])
def test_genai_has_no_type_for_the_other_families(family: str, tmp_path: Path) -> None:
    needed()
    assert family not in genai.TYPES
    assert "Unsupported model_type" in why_not(family, tmp_path)


def test_the_generation_config_is_kept(artifact: Frozen) -> None:
    assert artifact.generation_config is not None
    generation = type(artifact.generation_config)(
        do_sample=True, top_k=1, repetition_penalty=1.05, eos_token_id=[2, 3], pad_token_id=9
    )
    skeleton = without_weights(artifact.skeleton)
    skeleton.generation_config = generation
    config = genai.genai_config(replace(artifact, skeleton=skeleton), {"a": "1"})
    assert config["model"]["eos_token_id"] == [2, 3]
    assert config["model"]["pad_token_id"] == 9
    assert config["model"]["decoder"]["session_options"] == {"provider_options": [], "a": "1"}
    assert config["search"] == {
        "max_length": 256,
        "past_present_share_buffer": False,
        "do_sample": True,
        "top_k": 1,
        "repetition_penalty": 1.05,
    }
