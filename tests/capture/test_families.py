"""Every family, through the whole compiler. `docs/families.py` writes its table from these tests: a
test is a column, a family a row, and a cell is what the test recorded."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, LlavaNextConfig, PreTrainedModel

import gracec
from gracec.backends.onnx import genai
from gracec.capture import capture, captured_equals_eager, families, family_of
from gracec.capture.eager import eager_logits
from gracec.capture.families import qwen2_vl
from gracec.capture.families.qwen2_vl import GRID, rotary_positions
from gracec.capture.hidden import blocks_equal_hidden_states
from gracec.compiled import CompiledModel
from gracec.data.prompts import Prompts, encode_questions, question_about
from gracec.errors import GracecError
from gracec.evaluate.ask import _without_image
from gracec.ir.program import Program, annotation
from gracec.ir.queries import weight_of
from gracec.journal import Journal
from gracec.kernels.torchao import CountInt4Kernels
from gracec.models.experts import expert_modules
from gracec.models.loading import load_processor
from gracec.passes import run_passes
from gracec.passes.analyze_modality import AnalyzeModality
from gracec.passes.strip import Strip
from gracec.quant import ops
from gracec.recipe import Recipe
from gracec.request import Request
from gracec.stages.prepare import prepare
from gracec.stages.source import load_source
from gracec.stages.train import train
from gracec.training.setup import trainable
from tests import genai as onnxruntime_genai
from tests.backends.artifacts import artifact_of, dense_model
from tests.npm import install
from tests.tiny import tiny_image
from tests.tiny_families import CONFIGS, encode_conversations, tiny_model, tiny_processor
from tests.transformers_js import FAMILIES as JS_FAMILIES
from tests.transformers_js import NODE, ask, why_not

Golden = Callable[..., None]
Record = Callable[[str, object], None]
Batch = dict[str, Tensor]
WEIGHTS = {part: {"group_size": 32} for part in ("projector", "decoder")}
# In float32 the kernels add up what the dense weights do, but for the order.
RECIPE = Recipe.from_dict({"name": "check", "weights": WEIGHTS, "deploy": {"dtype": "float32"}})
NEW = {"max_new_tokens": 5, "do_sample": False}
PICTURES = ((32, 32), (48, 32), (64, 64), (44, 36))


@pytest.fixture(scope="module", params=list(CONFIGS))
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def model(name: str) -> PreTrainedModel:
    """Not to be changed by a test."""
    return tiny_model(name)


@pytest.fixture(scope="module")
def program(model: PreTrainedModel) -> Program:
    return run_passes(capture(model), [AnalyzeModality()]).program


@pytest.fixture(scope="module")
def compiled(name: str, model: PreTrainedModel) -> CompiledModel:
    return gracec.compile(model, RECIPE, processor=tiny_processor(name))


@pytest.fixture(scope="module")
def graphs(compiled: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path | GracecError:
    """A directory with ONNX graphs, or why there is none."""
    directory = tmp_path_factory.mktemp("onnx") / "out"
    try:
        compiled.export_onnx(directory, mode="faithful")
    except GracecError as error:
        return error
    return directory


@pytest.fixture(scope="module")
def asked(name: str) -> Batch:
    """What the processor returns for two questions about pictures of different shape."""
    pictures = [tiny_image(0, (40, 30)), tiny_image(1, (64, 32))]
    questions = ["what is this ?", "where is the small red circle ?"]
    batch = encode_questions(tiny_processor(name), questions, pictures)
    assert (batch["attention_mask"][:, 0] == 0).any(), "padded on the left"
    return batch


@pytest.fixture(scope="module")
def conversations(name: str) -> dict[str, Batch]:
    """What the processor returns for conversations of several turns."""
    pictures = [tiny_image(0, (40, 30)), tiny_image(1, (64, 32)), tiny_image(2, (32, 48))]
    two_pictures = [
        ("user", "what is this ?", pictures[:1]),
        ("assistant", "a red circle .", []),
        ("user", "where is the small star in it ?", pictures[1:2]),
    ]
    one_picture = [
        ("user", "how many are there ?", pictures[2:]),
        ("assistant", "two", []),
        ("user", "what color ?", []),
    ]
    no_picture = [
        ("user", "what is red ?", []),
        ("assistant", "a star", []),
        ("user", "how many are there in the middle ?", []),
    ]
    chosen = {
        "two pictures": [two_pictures],
        "one picture": [one_picture],
        "both": [two_pictures, one_picture],
        "one without": [one_picture, no_picture],
        "text alone": [no_picture, no_picture[2:]],
    }
    processor = tiny_processor(name)
    found = {what: encode_conversations(processor, turns) for what, turns in chosen.items()}
    for what in ("both", "one without", "text alone"):
        assert (found[what]["attention_mask"][:, 0] == 0).any(), "padded on the left"
    return {
        what: {key: value for key, value in batch.items() if key != "labels"}
        for what, batch in found.items()
    }


def test_capture(
    model: PreTrainedModel, program: Program, asked: Batch, record_property: Record
) -> None:
    """Batch 1, left padding, several images in a prompt, images of several shapes."""
    family = family_of(model)
    shapes = ((1, 3, 4), (4, 5, 12), (2, 2, 30))
    batches = [family.example_batch(model, batch=b, images=i, text=t) for b, i, t in shapes]
    count = captured_equals_eager(program, model)
    count += captured_equals_eager(program, model, [*batches, asked])
    record_property("cell", f"equal bits, {count} shapes")


def test_turns_are_captured(
    model: PreTrainedModel, program: Program, conversations: dict[str, Batch]
) -> None:
    """Several turns with a picture in each, in the first alone, and in one prompt of two."""
    seen = {what: batch for what, batch in conversations.items() if "pixel_values" in batch}
    assert len(seen) == 4
    assert captured_equals_eager(program, model, list(seen.values())) == 4


def test_texts_alone_are_captured(name: str, model: PreTrainedModel, program: Program) -> None:
    """The bits of the model, which is given no image; one text, and two with padding behind one."""
    family, prompts = family_of(model), Prompts(tiny_processor(name))
    texts = [question_about(None, text) for text in ("what is red ?", "how many are in it ?")]
    for asked in (texts[:1], texts):
        batch = prompts.encode(asked, ["a", "b"][: len(asked)], padding_side="right")
        assert family.without_images(model, batch)
        expected = eager_logits(model, batch)
        with torch.no_grad():
            (logits, *_) = program(**family.prepare(model, batch))
        written = batch["attention_mask"].bool()
        assert written.all() == (len(asked) == 1)
        assert torch.equal(logits[written], expected[written])
        index, sizes = family.image_index(model, batch)
        assert sizes == [] and (index == -1).all()


SIDES = ((224, 224), (448, 448), (1024, 768), (1, 1))


@pytest.mark.parametrize("size", [*SIDES, pytest.param((4000, 3000), marks=pytest.mark.slow)])
def test_tokens_of_an_image_are_those_of_the_processor(
    name: str, model: PreTrainedModel, size: tuple[int, int]
) -> None:
    """Of one picture, and of it and a small one in two prompts; and the features are as many."""
    if name == "lfm2_vl" and size != (1, 1):
        pytest.skip("the stand-in for its image processor makes no tiles of large pictures")
    family, processor = family_of(model), tiny_processor(name)
    pictures, questions = [tiny_image(0, size), tiny_image(1, (40, 30))], ["what ?", "what is it ?"]
    for count in (1, 2):
        batch = encode_questions(processor, questions[:count], pictures[:count])
        placeholders = int((batch["input_ids"] == model.config.image_token_id).sum())
        assert sum(family.image_tokens(model, batch)) == placeholders
        inputs = family.prepare(model, batch)
        with torch.no_grad():
            features = family.encode(model, {key: inputs[key] for key in family.vision})
        assert len(features) == placeholders


def test_the_smallest_picture_is_captured(
    name: str, model: PreTrainedModel, program: Program
) -> None:
    """No dimension of the graph is so long that one of its length is taken for another."""
    count = 1 + (name == "mistral3")  # transformers cannot run it with a single visual token
    pictures, questions = [tiny_image(0, (1, 1))] * count, ["what is this ?"] * count
    batch = encode_questions(tiny_processor(name), questions, pictures)
    assert captured_equals_eager(program, model, [batch]) == 1


def test_partition(program: Program, name: str, golden: Golden, record_property: Record) -> None:
    lines, parts = [], []
    for node in program.graph.nodes:
        notes = annotation(node)
        if "role" in notes:
            block = f" {notes['block']}" if "block" in notes else ""
            lines.append(f"{notes['role']}{block}: {node.target}")
        if "part" in notes:
            weight = weight_of(node)
            assert weight is not None
            parts.append(notes["part"])
            lines.append(f"{notes['part']}: {program.fqn(str(weight.target))}")
    model = f"{name} of tests/tiny_families.py"
    golden(f"families/{name}.txt", "\n".join(lines) + "\n", made_by=AnalyzeModality(), model=model)
    counts = [f"{parts.count(part)} {part}" for part in dict.fromkeys(parts)]
    record_property("cell", ", ".join(counts))


def test_blocks_are_those_of_the_model(model: PreTrainedModel, program: Program) -> None:
    """As many as the configuration says, and what each returns is the model's hidden state."""
    layers = model.config.get_text_config().num_hidden_layers
    assert program.decoder_layers == layers == len(list(program.nodes(role="block_output")))
    assert blocks_equal_hidden_states(program, model) == layers - 1


@pytest.mark.slow
def test_grace_step(name: str, model: PreTrainedModel, record_property: Record) -> None:
    """Every weight and every scale is moved by one step of the whole objective, whose samples come
    one by one; one of them is a text alone."""
    recipe = Recipe.load("w4a16")
    assert recipe.training is not None and recipe.training.distillation.omega
    steps = {
        "steps": 1,
        "micro_batch_size": 1,
        "frozen": [],
        "warmup": 0.0,
        "weight_decay": 0.0,
        "keep": "last",
    }
    training = recipe.training.model_copy(update=steps)
    weights = {**RECIPE.weights, "vision": RECIPE.weights["decoder"]}
    recipe = recipe.model_copy(update={"training": training, "weights": weights})
    records = [
        {"image": tiny_image(number, (40, 32)), "question": "what is this ?", "answer": answer}
        for number, answer in enumerate(("red circle", "two", "no"))
    ]
    text = {"question": "is it ?", "answer": "yes"}
    request = Request.checked(
        model,
        recipe,
        teacher=model,
        train_data=[*records[:2], text],
        eval_data=[*records[2:], text],
        processor=tiny_processor(name),
        progress=False,
    )
    journal = Journal()
    prepared = prepare(load_source(model, request, journal), request, journal)
    before = trainable(prepared.program, [])
    learnt = trainable(train(prepared, request, journal).program, [])
    terms = journal.training["rows"][0]
    assert terms["ce"] > 0 and terms["distillation"] > 0 and terms["rcka"] > 0
    stripped = run_passes(prepared.program, [Strip()]).program
    needed = {names[0] for names in stripped.fqns.values()}
    learnt = {fqn: p for fqn, p in learnt.items() if fqn in needed}
    assert not [fqn for fqn, p in learnt.items() if torch.equal(p, before[fqn])]
    scales = sum(fqn.endswith("_scale") for fqn in learnt)
    record_property("cell", f"{len(learnt) - scales} weights and {scales} scales moved")


@pytest.mark.slow
def test_torchao(
    compiled: CompiledModel, asked: Batch, tmp_path: Path, record_property: Record
) -> None:
    """INT4 kernels generate what the fake-quantized weights do; so does the reloaded artifact."""
    dense = dense_model(artifact_of(compiled))
    inputs = family_of(dense).model_inputs(dense, asked)
    with CountInt4Kernels() as kernels:
        found = compiled.generate(**asked, **NEW)
    assert kernels.count
    expected: Any = dense.generate(**inputs, **NEW)
    assert torch.equal(found, expected)
    compiled.save_pretrained(tmp_path / "out", ())
    again = gracec.load(tmp_path / "out")
    assert torch.equal(again(**asked).logits, compiled(**asked).logits)
    assert torch.equal(again.generate(**asked, **NEW), found)
    record_property("cell", f"same tokens, {len(compiled.weights)} weights")


@pytest.mark.slow
def test_turns_are_answered(compiled: CompiledModel, conversations: dict[str, Batch]) -> None:
    """INT4 kernels continue conversations as the fake-quantized weights do."""
    dense = dense_model(artifact_of(compiled))
    for what, batch in conversations.items():
        inputs = family_of(dense).model_inputs(dense, batch)
        expected: Any = dense.generate(**inputs, **NEW)
        assert torch.equal(compiled.generate(**batch, **NEW), expected), what
        if "pixel_values" in batch:
            with torch.no_grad():
                logits = dense(**inputs, use_cache=False).logits
            known = batch["attention_mask"].bool()
            found = compiled(**batch).logits
            torch.testing.assert_close(found[known], logits[known], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_hf(compiled: CompiledModel, asked: Batch, tmp_path: Path, record_property: Record) -> None:
    """Plain transformers loads every key and computes the logits of the dense weights."""
    if expert_modules(compiled.model):
        with pytest.raises(GracecError, match="routed experts are no linears"):
            compiled.save_pretrained(tmp_path / "out", "hf")
        record_property("cell", "refused: the weights of routed experts are no linears")
        return
    compiled.save_pretrained(tmp_path / "out", "hf")
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(loaded[1].values())
    dense = dense_model(artifact_of(compiled))
    inputs = family_of(dense).model_inputs(dense, asked)
    with torch.no_grad():
        assert torch.equal(loaded[0](**inputs).logits, dense(**inputs).logits)
    record_property("cell", "equal bits")


@pytest.mark.slow
def test_onnx(
    compiled: CompiledModel,
    graphs: Path | GracecError,
    asked: Batch,
    conversations: dict[str, Batch],
    record_property: Record,
) -> None:
    """ONNX Runtime generates the same tokens, with all gates; or there is a reason why not."""
    family = family_of(compiled.model)
    if isinstance(graphs, GracecError):
        model_type = compiled.frozen.config.model_type
        assert not family.serving
        assert graphs.what == f"the family {model_type!r} {family.serving_refusal}"
        record_property("cell", f"refused: {family.serving_refusal}")
        return
    runner = gracec.load(graphs, backend="onnx")
    assert torch.equal(runner.generate(**asked, **NEW), compiled.generate(**asked, **NEW))
    text = {"input_ids": torch.tensor([[6, 7, 8]])}
    for batch in (text, *conversations.values()):
        assert torch.equal(runner.generate(**batch, **NEW), compiled.generate(**batch, **NEW))
    beams = {"max_new_tokens": 4, "num_beams": 2, "num_return_sequences": 2}
    assert torch.equal(runner.generate(**asked, **beams), compiled.generate(**asked, **beams))
    parts = runner.generate(**asked, **NEW, prefill_chunk_size=9)
    assert torch.equal(parts, runner.generate(**asked, **NEW))
    record_property("cell", "same tokens")


@pytest.mark.slow
def test_transformers_js(
    name: str,
    model: PreTrainedModel,
    graphs: Path | GracecError,
    tmp_path: Path,
    record_property: Record,
) -> None:
    """transformers.js in Node reads the same directory and generates the same tokens.

    Each side resizes pictures in a way of its own. So tokens are those of ONNX Runtime in Python
    from the pixels that transformers.js made, and these are held to what Python makes.
    """
    if isinstance(graphs, GracecError):
        record_property("cell", "-")
        return
    install(NODE)
    if name not in JS_FAMILIES:
        tiny_image(0).save(tmp_path / "0.png")
        asked = {"images": [str(tmp_path / "0.png")], "question": "what is this ?"}
        reason = why_not(graphs, asked)
        unknown = re.search("Unknown image_processor_type|Unsupported model type", reason)
        assert reason
        record_property("cell", "no model type for it" if unknown else f"fails: {reason}")
        return
    runner: Any = gracec.load(graphs, backend="onnx")
    processor, question = tiny_processor(name), "what is this ?"
    pictures = [tiny_image(seed, size) for seed, size in enumerate(PICTURES)]
    files = [str(tmp_path / f"{number}.png") for number in range(len(pictures))]
    for picture, file in zip(pictures, files, strict=True):
        picture.save(file)

    def prompt(count: int) -> Batch:
        content = [{"type": "image", "image": picture} for picture in pictures[:count]]
        message = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        found = processor.apply_chat_template(
            [[message]], **options, processor_kwargs={"return_tensors": "pt"}, return_tensors="pt"
        )
        batch = {name: found[name] for name in found if name not in family_of(model).computed}
        masks = {name: batch[name].bool() for name in batch if name == "pixel_attention_mask"}
        return {**batch, **masks}

    def expected(inputs: Batch) -> list[int]:
        start = inputs["input_ids"].shape[1]
        tokens: list[int] = runner.generate(**inputs, max_new_tokens=12)[0, start:].tolist()
        return tokens

    lines = [{"images": [file], "question": question} for file in files]
    lines += [{"images": [], "question": question}, {"images": files[:2], "question": question}]
    lines += [{"inputs": prompt(2)}, {"inputs": prompt(0)}]
    *each, text, two, two_given, text_given = ask(graphs, lines, tokens=12)

    for picture, told in zip(pictures, each, strict=True):
        own = encode_questions(processor, [question], [picture])
        assert not told.error
        assert torch.equal(told.inputs["input_ids"], own["input_ids"])
        assert told.tokens == expected(told.inputs)
        difference = (told.inputs["pixel_values"] - own["pixel_values"]).abs()
        assert difference.mean() < 0.05
        if picture.size == ((64, 64) if name == "smolvlm" else (32, 32)):  # nothing is resized
            tiles = slice(-1 if name == "smolvlm" else None)  # but the whole picture, after them
            assert difference[:, tiles].max() < 1e-6
            assert told.tokens == expected(own)
    assert len({tuple(told.tokens) for told in each}) > 2

    without = expected(prompt(0))
    assert torch.equal(text.inputs["input_ids"], prompt(0)["input_ids"])
    assert text.tokens == without
    # Without an empty grid, it takes a prompt of Qwen-VL to be three times as long as it is.
    assert (text_given.tokens == without) == (GRID not in prompt(1))

    pair = expected(prompt(2))
    assert two_given.tokens == pair
    cell = "same tokens"
    if name in ("idefics3", "smolvlm"):
        assert two.tokens == expected(two.inputs)
    else:
        assert re.search("offset is out of bounds|tokens and features do not match", two.error)
        cell += "; one image a prompt"
    record_property("cell", cell)


@pytest.mark.slow
def test_genai(
    name: str, graphs: Path | GracecError, tmp_path: Path, record_property: Record
) -> None:
    """onnxruntime-genai generates the same tokens from files of pictures; or why there is nothing
    for it."""
    if isinstance(graphs, GracecError):
        record_property("cell", "-")
        return
    onnxruntime_genai.needed()
    model_type = CONFIGS[name]().model_type
    if model_type not in genai.TYPES:
        unknown = "Unsupported model_type" in onnxruntime_genai.why_not(model_type, tmp_path)
        assert unknown or model_type == "mistral3"
        record_property("cell", "no model type for it" if unknown else "not written for its type")
        return
    pictures = [tmp_path / "0.png", tmp_path / "1.png"]
    for seed, (picture, size) in enumerate(zip(pictures, ((50, 30), (64, 32)), strict=True)):
        tiny_image(seed, size).save(picture)
    one, two = onnxruntime_genai.IMAGE, onnxruntime_genai.IMAGE * 2
    questions: list[onnxruntime_genai.Question] = [
        (f"{one}what is this ?", pictures[:1]),
        (f"{one}where is the small red circle ?", pictures[1:]),
        (f"{two}which is red ?", pictures),
        ("which is red ?", []),
    ]
    found = onnxruntime_genai.ask(graphs, questions)
    wanted = onnxruntime_genai.expected(graphs, questions)
    assert [answer.answer for answer in found] == [answer.answer for answer in wanted]
    record_property("cell", "same tokens")


def test_videos_are_refused(model: PreTrainedModel, asked: Batch) -> None:
    video = {**asked, "pixel_values_videos": torch.zeros(1, 2, 3, 32, 32)}
    with pytest.raises(GracecError, match="videos are not captured") as error:
        family_of(model).prepare(model, video)
    assert "\n" not in str(error.value)


def test_the_blind_control_keeps_its_images(model: PreTrainedModel, asked: Batch) -> None:
    family = family_of(model)
    blank = _without_image(asked)
    assert blank["pixel_values"].abs().max() < 1e-30
    found, usual = family.prepare(model, blank), family.prepare(model, asked)
    assert found["pixel_values"].shape == usual["pixel_values"].shape


def test_an_image_less_or_a_placeholder_more(model: PreTrainedModel, asked: Batch) -> None:
    """An error of one line."""
    family = family_of(model)
    text = {name: asked[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(GracecError, match="pixel_values is missing.*placeholders"):
        family.prepare(model, text)
    ids = asked["input_ids"].clone()
    ids[1, (ids[1] == model.config.image_token_id).nonzero()[0]] = 7
    with pytest.raises(GracecError, match="sample 1 of the batch: the prompt holds") as error:
        family.prepare(model, {**asked, "input_ids": ids})
    assert "\n" not in str(error.value)


def test_positions_are_those_of_transformers() -> None:
    """Rotary positions in time, height and width, of random prompts with several images."""
    draw = random.Random(0)
    model: Any = tiny_model("qwen2_vl")
    merge, image = 2, model.config.image_token_id
    for _ in range(20):
        rows, masks, indices, grids = [], [], [], []
        for _ in range(2):
            row, index = [6], [-1]
            for _ in range(draw.randrange(3)):
                height, width = draw.randrange(1, 4), draw.randrange(1, 4)
                row += [image] * (height * width) + [8] * draw.randrange(1, 4)
                index += [len(grids)] * (height * width)
                index += [-1] * (len(row) - len(index))
                grids.append((1, merge * height, merge * width))
            rows.append(row)
            indices.append(index)
        length = max(map(len, rows))
        masks = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
        ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
        index = torch.tensor([[-1] * (length - len(row)) + row for row in indices])
        mask = torch.tensor(masks)
        grid = torch.tensor(grids).reshape(-1, 3)
        expected, _ = model.model.get_rope_index(ids, (ids == image).int(), grid, None, mask)
        assert torch.equal(rotary_positions(index, mask, grid, merge), expected)


def test_tokens_of_tiles_at_their_real_size() -> None:
    """LLaVA-NeXT with the tiles of its checkpoints: 336 pixels, in five shapes."""
    model: Any = SimpleNamespace(config=LlavaNextConfig())
    processor = tiny_processor("llava_next")
    processor.patch_size = model.config.vision_config.patch_size
    processor.image_processor.image_grid_pinpoints = model.config.image_grid_pinpoints
    sizes = [(224, 224), (448, 448), (768, 1024), (1024, 768), (3000, 4000), (1, 1), (336, 2000)]
    counted = processor._get_num_multimodal_tokens(
        sizes, size={"height": 336, "width": 336}, vision_feature_select_strategy="default"
    )
    family = families()["llava_next"]
    found = family.image_tokens(model, {"image_sizes": torch.tensor(sizes)})
    assert found == counted["num_image_tokens"]
    assert max(found) == 2928 and min(found) == 1176


def test_features_that_are_scaled_down() -> None:
    """Of an image with more tiles than there may be features; equal but for rounding."""
    model: Any = tiny_model("llava_onevision")
    family = family_of(model)
    generator = torch.Generator().manual_seed(0)
    batch = {
        "pixel_values": torch.randn((2, 10, 3, 32, 32), generator=generator),
        "image_sizes": torch.tensor([[96, 96], [90, 60]]),
    }
    with torch.no_grad():
        expected = model.model.get_image_features(**batch).pooler_output
        found = family.encode(model, family.vision_inputs(model, batch))
    assert family.image_tokens(model, batch) == [len(image) for image in expected]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-6, atol=1e-6)


def test_too_many_patches_for_a_serving_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen2_vl")
    family = family_of(model)
    inputs = family.prepare(model, family.example_batch(model))
    assert set(family.vision_feed(inputs)) == {"pixel_values", "grid_thw"}
    monkeypatch.setattr(qwen2_vl, "SERVED_PATCHES", 10)
    with pytest.raises(GracecError, match="56 patches, the vision encoder takes 10 at once"):
        family.vision_feed(inputs)


def test_attention_of_segments_is_that_of_a_mask() -> None:
    """And it needs no more memory than the longest segment."""
    generator = torch.Generator().manual_seed(0)
    segments = torch.tensor([0, 0, 0, 4, 4, 5, 5, 5, 5])
    q, k, v = (torch.randn(1, 2, 9, 8, generator=generator, requires_grad=True) for _ in range(3))
    lengths = ops.segment_lengths(segments)
    assert lengths.tolist() == [3, 2, 4, 0, 0, 0, 0, 0, 0]
    found = ops.segment_attention(q, k, v, lengths, 0.3)
    mask = segments[:, None] == segments[None, :]
    attend = torch.nn.functional.scaled_dot_product_attention
    expected = attend(q, k, v, mask, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    weight = torch.randn(found.shape, generator=generator)
    grads = torch.autograd.grad((found * weight).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want)
    long = torch.zeros(1, 1, 32768, 4)  # a mask would have 2^30 elements
    parts = ops.segment_lengths(torch.arange(32768) // 64)
    assert ops.segment_attention(long, long, long, parts, 1.0).shape == (1, 32768, 1, 4)
    torch.library.opcheck(ops.segment_attention, (q, k, v, lengths, 0.3))
    torch.library.opcheck(ops.segment_lengths, (segments,))


@pytest.mark.parametrize(("name", "kinds"), [("qwen2_vl", 1), ("qwen2_5_vl", 2)])
def test_a_device_is_asked_once_for_the_lengths_of_segments(name: str, kinds: int) -> None:
    """And not by every block of the tower."""
    program = capture(tiny_model(name))
    gracec = torch.ops.gracec
    assert len(list(program.nodes(gracec.segment_lengths.default))) == kinds
    assert len(list(program.nodes(gracec.segment_attention.default))) >= 2


def test_the_processor_of_pixtral_needs_no_torchvision(tmp_path: Path) -> None:
    """It is read from its directory, where transformers finds no class without torchvision."""
    processor = tiny_processor("mistral3")
    processor.save_pretrained(tmp_path)
    tiny_model("mistral3").config.save_pretrained(tmp_path)
    again, picture = load_processor(tmp_path), tiny_image(0, (40, 30))
    found, expected = (encode_questions(p, ["what ?"], [picture]) for p in (again, processor))
    assert all(torch.equal(found[key], expected[key]) for key in expected)
