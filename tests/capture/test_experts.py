"""Decoders with routed experts, through the whole compiler."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import gracec
from gracec.backends.onnx.runner import OnnxModel
from gracec.capture import capture, captured_equals_eager, family_of
from gracec.capture.capture import run_both
from gracec.capture.hidden import blocks_equal_hidden_states
from gracec.compiled import CompiledModel
from gracec.errors import GateError, GracecError, PassError
from gracec.ir.program import Program, annotate
from gracec.journal import Journal
from gracec.kernels.torchao import CountInt4Kernels
from gracec.models.experts import EAGER, GROUPED, expert_modules, experts_computed
from gracec.passes import run_passes
from gracec.passes.analyze_modality import AnalyzeModality
from gracec.quant import search_scales
from gracec.request import Request
from gracec.stages.freeze import freeze
from gracec.stages.lower import lower
from gracec.stages.prepare import prepare
from gracec.stages.source import load_source
from gracec.stages.train import train
from gracec.training.setup import trainable
from tests.tiny import tiny_image, tiny_llava
from tests.tiny_experts import CONFIGS, tiny_experts, tiny_processor

NEW = {"max_new_tokens": 4, "do_sample": False}
ROUTERS = ("mlp.gate.weight", "mlp.router.weight")
GATE_UP = "model.language_model.layers.0.mlp.experts.gate_up_proj"


def by_weights_alone() -> gracec.Recipe:
    """w4a16-ptq without a look at the inputs, so that a test can search for the same scales."""
    fields = gracec.Recipe.load("w4a16-ptq").to_dict()
    return gracec.Recipe.from_dict({**fields, "calibration": {"method": "weights"}})


SLOW = {"qwen3_vl_moe": pytest.mark.slow}  # it is captured in test_families.py


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=SLOW.get(name, ())) for name in CONFIGS]
)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def model(name: str) -> PreTrainedModel:
    """Not to be changed by a test."""
    return tiny_experts(name)


@pytest.fixture(scope="module")
def program(model: PreTrainedModel) -> Program:
    return run_passes(capture(model), [AnalyzeModality()]).program


@pytest.fixture(
    scope="module",
    params=[
        "llava_mixtral",
        "aria",
        pytest.param("internvl_qwen3_moe", marks=pytest.mark.slow),
        pytest.param("qwen3_vl_moe", marks=pytest.mark.slow),
    ],
)
def compiled(request: pytest.FixtureRequest) -> CompiledModel:
    model, processor = tiny_experts(request.param), tiny_processor(request.param)
    return gracec.compile(model, by_weights_alone(), processor=processor)


@pytest.fixture(scope="module")
def original(compiled: CompiledModel) -> PreTrainedModel:
    """What `compiled` was made of."""
    kinds = {make().model_type: name for name, make in CONFIGS.items()}
    return tiny_experts(kinds[compiled.frozen.config.model_type])


def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**family_of(model).model_inputs(model, batch), use_cache=False).logits
    return found


def test_the_graph_is_the_loop_of_transformers(model: PreTrainedModel, program: Program) -> None:
    assert captured_equals_eager(program, model) == 3
    how = model.config.get_text_config()._experts_implementation
    assert how not in (EAGER, GROUPED), "left as it was"
    batch = family_of(model).example_batch(model, batch=3, images=3, text=9)
    with experts_computed(model, EAGER):
        expected = logits_of(model, batch)
    given = logits_of(model, batch)  # with the kernel that transformers chooses
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    bound = 1e-3 * float(expected.abs().max())
    assert (expected - _with_swapped_experts(model, batch)).abs().max() > bound, "it would be seen"


def _with_swapped_experts(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    weight = next(iter(expert_modules(model).values())).gate_up_proj
    before = weight.detach().clone()
    weight.data = before.roll(1, 0)
    try:
        return logits_of(model, batch)
    finally:
        weight.data = before


def test_blocks_are_those_of_the_model(model: PreTrainedModel, program: Program) -> None:
    layers = model.config.get_text_config().num_hidden_layers
    assert program.decoder_layers == layers == len(list(program.nodes(role="block_output")))
    assert blocks_equal_hidden_states(program, model) == layers - 1


def test_another_number_of_blocks_is_refused(program: Program) -> None:
    other = program.copy()
    assert other.decoder_layers is not None
    other.decoder_layers += 1
    expected = f"found {other.decoder_layers - 1} decoder blocks, the model's configuration says"
    with pytest.raises(PassError, match=expected):
        AnalyzeModality().run(other)


def test_another_output_of_a_block_is_refused(model: PreTrainedModel, program: Program) -> None:
    other = program.copy()
    first = next(other.nodes(role="block_output"))
    norm = next(user for user in first.users if user.meta["val"].shape == first.meta["val"].shape)
    annotate(norm, role="block_output", block=0)
    annotate(first, role=None, block=None)
    with pytest.raises(GateError, match="decoder block 0 is not the hidden state"):
        blocks_equal_hidden_states(other, model)


def test_routers_are_found(program: Program) -> None:
    found = {program.fqn(str(node.args[1].target)) for node in program.nodes(role="router")}
    weights = {names[0] for names in program.fqns.values()}
    assert found == {n for n in weights if n.endswith(ROUTERS)}
    assert found


def test_routers_are_kept_and_experts_are_codes(
    original: PreTrainedModel, compiled: CompiledModel
) -> None:
    rows = {row.fqns[0]: row for row in compiled.report.plan}
    routers = [fqn for fqn in rows if fqn.endswith(ROUTERS)]
    assert {rows[fqn].reason for fqn in routers} == {"router: chooses experts, never quantized"}
    text = f"{len(routers)} routers keep their precision"
    assert any(note.text.startswith(text) for note in compiled.report.notes)
    for path, module in expert_modules(original).items():
        for projection in ("gate_up_proj", "down_proj"):
            fqn = f"{path}.{projection}"
            held = original.get_parameter(fqn).detach()
            weight = compiled.weights[fqn]
            assert weight.held_shape == held.shape and rows[fqn].spec == weight.spec
            assert weight.experts is not None and weight.experts.count == module.num_experts
            per_expert = held.transpose(1, 2) if module.is_transposed else held
            for number, one in enumerate(weight.matrices()):
                group = weight.group_size
                scales = search_scales(per_expert[number], 4, group, signed=True)
                assert torch.equal(one.scales, scales), "groups lie along the input features"
                assert torch.equal(
                    weight.dequantize()[number],
                    one.dequantize().t() if module.is_transposed else one.dequantize(),
                )
            error = (weight.dequantize() - held).norm() / held.norm()
            assert error < 0.15


def test_each_expert_runs_on_a_kernel(compiled: CompiledModel, original: PreTrainedModel) -> None:
    batch = family_of(original).example_batch(original)
    nodes = list(compiled.runtime.program.nodes(kernel="int4"))
    linears = [node for node in nodes if node.target == torch.nn.functional.linear]
    with CountInt4Kernels() as kernels:
        compiled(**batch)
    layers = len(expert_modules(original))
    assert len(nodes) - len(linears) == 2 * layers
    assert len(linears) + 2 * layers <= kernels.count <= len(linears) + 2 * layers * 4
    assert not [note for note in compiled.report.notes if "runs dense" in note.text]


def test_the_artifact_loads(
    compiled: CompiledModel, original: PreTrainedModel, tmp_path: Path
) -> None:
    compiled.save_pretrained(tmp_path / "out", ())
    again = gracec.load(tmp_path / "out")
    batch = family_of(original).example_batch(original)
    assert torch.equal(again(**batch).logits, compiled(**batch).logits)
    assert torch.equal(again.generate(**batch, **NEW), compiled.generate(**batch, **NEW))


@pytest.mark.parametrize(
    "name", ["llava_mixtral", pytest.param("aria", marks=pytest.mark.slow)], indirect=True
)
def test_experts_that_no_kernel_takes_run_dense_and_strict_refuses(name: str) -> None:
    """Eight bits: the same values as those of the frozen graph, without a kernel."""
    recipe = gracec.Recipe.from_dict(
        {
            "name": "wide",
            "weights": {"decoder": {"bits": 8, "group_size": 32}},
            "deploy": {"dtype": "float32"},
        }
    )
    model = tiny_experts(name, **({} if name == "aria" else {"layers": 1}))
    found = gracec.compile(model, recipe)
    dense = {note.text.split()[0] for note in found.report.notes if "runs dense" in note.text}
    assert GATE_UP in dense
    assert float(found.report.gates["logits"].kl) < 1e-9
    with pytest.raises(GracecError, match="the kernel takes codes of up to 4 bits"):
        gracec.compile(model, recipe, strict=True)


@pytest.mark.slow
def test_experts_learn(name: str, model: PreTrainedModel) -> None:
    """One step of the whole objective moves every expert that is asked, its scales and routers."""
    recipe = gracec.Recipe.load("w4a16")
    assert recipe.training is not None
    steps = {"steps": 1, "frozen": [], "warmup": 0.0, "weight_decay": 0.0, "keep": "last"}
    training = recipe.training.model_copy(update=steps)
    recipe = recipe.model_copy(update={"training": training})
    records = [
        {"image": tiny_image(number), "question": "what is this ?", "answer": answer}
        for number, answer in enumerate(("red circle", "two", "no"))
    ]
    request = Request.checked(
        model,
        recipe,
        teacher=model,
        train_data=records[:2],
        eval_data=records[2:],
        processor=tiny_processor(name),
        progress=False,
    )
    journal = Journal()
    prepared = prepare(load_source(model, request, journal), request, journal)
    before = trainable(prepared.program, [])
    trained = train(prepared, request, journal)
    learnt = trainable(trained.program, [])
    terms = journal.training["rows"][0]
    assert terms["ce"] > 0 and terms["distillation"] > 0 and terms["rcka"] > 0
    watched = {fqn for fqn in learnt if ".experts." in fqn or fqn.endswith(ROUTERS)}
    assert len(watched) == 5 * len(expert_modules(model))
    assert not [fqn for fqn in watched if torch.equal(learnt[fqn], before[fqn])]
    frozen = freeze(trained, request, journal)
    runtime = lower(frozen, request.target, journal)
    assert {fqn for fqn in frozen.weights if ".experts." in fqn} == {
        fqn for fqn in watched if fqn.endswith("_proj")
    }
    assert runtime(**family_of(model).example_batch(model)).logits.isfinite().all()


@pytest.mark.parametrize(
    "form", ["hf", *(pytest.param(name, marks=pytest.mark.slow) for name in ("awq", "torchao"))]
)
def test_formats_refuse_experts_before_anything_is_written(form: str, tmp_path: Path) -> None:
    model = tiny_experts("llava_mixtral", layers=1)
    with pytest.raises(GracecError, match="the weights of routed experts are no linears"):
        gracec.compile(model, "w4a16-ptq", output_dir=tmp_path / "out", formats=form)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_vl_moe", "aria"], indirect=True)
def test_families_without_serving_graphs_are_refused(name: str) -> None:
    with pytest.raises(GracecError, match="has no serving graphs"):
        gracec.compile(tiny_experts(name), "w4a16-ptq", target="onnxruntime")


@pytest.mark.slow
@pytest.mark.parametrize("ops", ["matmulnbits", "qdq"])
def test_onnx(ops: str, tmp_path: Path) -> None:
    """One MatMulNBits an expert, on its rows alone; the tokens are those of the codes."""
    recipe = gracec.Recipe.from_dict(
        {
            "name": "float32",
            "weights": {"decoder": {"group_size": 32}},
            "deploy": {"dtype": "float32"},
        }
    )
    model = tiny_experts("llava_mixtral")
    compiled = gracec.compile(model, recipe, processor=tiny_processor("llava_mixtral"))
    compiled.export_onnx(tmp_path / "out", ops=ops, mode="faithful")
    session = json.loads((tmp_path / "out/onnx/session.json").read_text())
    assert session["kernels"]["decoder"] == 2 * 4 + 2 * 2 * 4, "q, k, v, o and four experts twice"
    assert session["gates"]["greedy"]["different"] == 0
    runner = OnnxModel.load(tmp_path / "out")
    batch = family_of(model).example_batch(model, batch=2, images=2, text=5)
    assert torch.equal(runner.generate(**batch, **NEW), compiled.generate(**batch, **NEW))


@pytest.mark.slow
def test_experts_in_float_are_written_to_onnx_too(tmp_path: Path) -> None:
    recipe = gracec.Recipe.from_dict(
        {"name": "projector", "weights": {"projector": {"group_size": 32}}}
    )
    model = tiny_experts("llava_mixtral", layers=1)
    compiled = gracec.compile(model, recipe, processor=tiny_processor("llava_mixtral"))
    compiled.export_onnx(tmp_path / "out")
    session = json.loads((tmp_path / "out/onnx/session.json").read_text())
    assert session["kernels"] == {"decoder": 0, "embed_tokens": 0, "vision_encoder": 2}
    assert session["gates"]["greedy"]["different"] == 0


def test_the_inputs_of_experts_are_rounded(tmp_path: Path) -> None:
    """As the graph rounds them, so does the model that generates."""
    model = tiny_experts("llava_mixtral", layers=1)
    records = [
        {"image": tiny_image(number), "question": "what is this ?", "answer": answer}
        for number, answer in enumerate(("red circle", "two"))
    ]
    found = gracec.compile(
        model, "w4a8", processor=tiny_processor("llava_mixtral"), train_data=records
    )
    grids = {fqn: w.activation for fqn, w in found.weights.items() if ".experts." in fqn}
    assert len(grids) == 2 and all(grids.values())
    up, down = grids.values()
    assert up is not None and down is not None and not torch.equal(up.scales, down.scales)
    assert str(found.report.gates["lowered_equals_generating"]) == "equal bits, 3 batches"
    found.save_pretrained(tmp_path / "out", ())
    batch = family_of(model).example_batch(model)
    assert torch.equal(gracec.load(tmp_path / "out")(**batch).logits, found(**batch).logits)


def test_the_graph_rounds_as_the_loop_does_in_bfloat16() -> None:
    """Where the kernel that transformers prefers is off by some of the last bits."""
    model = tiny_experts("llava_mixtral", dtype=torch.bfloat16)
    assert captured_equals_eager(capture(model), model) == 3
    batch = family_of(model).example_batch(model, batch=3, images=3, text=9)
    with experts_computed(model, EAGER):
        expected = logits_of(model, batch)
    assert not torch.equal(logits_of(model, batch), expected)


def test_what_threads_round_otherwise_is_compared_on_one() -> None:
    model = tiny_experts("llava_mixtral", layers=1)
    before, tried = torch.get_num_threads(), []
    one, other = torch.zeros(1), torch.ones(1)

    def run() -> list[tuple[Tensor, Tensor]]:
        tried.append(torch.get_num_threads())
        return [(one, one if torch.get_num_threads() == 1 else other)]

    torch.set_num_threads(2)
    try:
        assert torch.equal(*run_both(model, run)[0])
        assert tried == [2, 1] and torch.get_num_threads() == 2
        assert not torch.equal(*run_both(tiny_llava(), run)[0]), (
            "without experts nothing is excused"
        )
    finally:
        torch.set_num_threads(before)
