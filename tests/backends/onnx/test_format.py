import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

import gracec
from gracec.backends.compressed_tensors import HuggingFace
from gracec.backends.onnx import format as format_
from gracec.backends.onnx import gates, genai, mode, runner, write
from gracec.backends.onnx.format import Onnx
from gracec.backends.onnx.write import WrittenGraph
from gracec.capture.serving import Serving, ServingProgram, apply_codes
from gracec.compiled import CompiledModel
from gracec.errors import GateError, GracecError
from gracec.evaluate import evaluate_vqa, load_samples
from gracec.frozen import build, dense_twin
from gracec.gates import LogitAgreement
from gracec.journal import Note
from gracec.kernels import onnxruntime as kernel
from gracec.quant import QuantSpec
from tests.backends import artifacts
from tests.backends.artifacts import artifact_of, decoder_specs, random_artifact
from tests.backends.onnx.test_gates import lowered
from tests.tiny import tiny_llava

ROOT = Path(__file__).parents[3]
STUDENT = ROOT / "examples/emojivqa/student"


def test_one_directory_for_several_libraries(bundle: Path, batch: dict[str, Tensor]) -> None:
    notes = (bundle / "notes.txt").read_text().splitlines()
    standard, fused, note, chosen = (note for note in notes if note.startswith("onnx: "))
    assert standard.endswith("5 norms, 4 rotary embeddings, 2 attentions")
    assert fused.endswith(
        "fused decoder: 4 groups of linears, 2 attentions, 4 norms after additions"
    )
    assert note.startswith("onnx: 14 matmuls on INT4 kernels, KL ")
    assert chosen.startswith("onnx: mode fast: 8-bit inputs change nothing that counts, KL ")
    assert {path.name for path in (bundle / "onnx").iterdir()} == {
        "vision_encoder.onnx",
        "embed_tokens.onnx",
        "decoder_model_merged_q4.onnx",
        "decoder_model_merged_q4.onnx_data",
        "fused_decoder.onnx",
        "session.json",
    }
    config = json.loads((bundle / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert config["transformers.js_config"] == {
        "dtype": {
            "vision_encoder": "fp32",
            "embed_tokens": "fp32",
            "decoder_model_merged": "q4",
        },
        "use_external_data_format": {"decoder_model_merged_q4.onnx": 1},
    }
    assert json.loads((bundle / "preprocessor_config.json").read_text())["processor_class"]
    assert json.loads((bundle / "tokenizer_config.json").read_text())["chat_template"]
    found = gracec.load(bundle, backend="onnx").generate(**batch, max_new_tokens=4)
    assert found.shape == (2, batch["input_ids"].shape[1] + 4)


def test_every_library_reads_the_same_codes(bundle: Path) -> None:
    weights = gracec.load(bundle, "torchao").weights

    def hashes(dense: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
        """Of the codes, which dense weights give back exactly."""
        found = {}
        for fqn, weight in dense:
            scales = weights[fqn].scales.repeat_interleave(weights[fqn].group_size, dim=1)
            codes = (weight.float() / scales).round().to(torch.int8)
            found[fqn] = hashlib.sha256(codes.numpy().tobytes()).hexdigest()
        return found

    stored = {
        fqn: hashlib.sha256(w.codes.numpy().tobytes()).hexdigest() for fqn, w in weights.items()
    }
    assert len(set(stored.values())) == 14
    assert stored == hashes(HuggingFace().stored_weights(bundle))
    assert stored == hashes(Onnx().stored_weights(bundle / "onnx"))


def test_transformers_loads_it_too(
    bundle: Path, compiled: CompiledModel, batch: dict[str, Tensor]
) -> None:
    loaded = AutoModelForImageTextToText.from_pretrained(bundle)
    dense = dense_twin(artifact_of(compiled), torch.bfloat16)
    found, expected = (artifacts.logits_of(model, batch) for model in (loaded, dense))
    assert torch.equal(found, expected)


def test_the_figures_of_the_gates(bundle: Path) -> None:
    session = json.loads((bundle / "onnx/session.json").read_text())
    figures = session["gates"]
    assert figures["equal_code_hashes"] == figures["int4_kernels"] == 14
    assert figures["composed_equals_training"] <= 1e-6
    faithful, fast = (figures["modes"][name] for name in ("faithful", "fast"))
    assert faithful["matmul_error"] <= 1e-6 < 1e-4 < fast["matmul_error"] <= 2e-2
    assert faithful["logits"]["kl"] <= 1e-9 < figures["logits_dense_bfloat16"]["kl"]
    assert faithful["logits"]["top1"] == 1
    assert faithful["logits_compiled"]["kl"] <= 1e-4
    assert faithful["greedy"] == {"same": 2, "ambiguous": 0, "different": 0, "tokens": 16}
    assert session["mode"] == "fast" and 1e-9 < fast["logits"]["kl"] <= 1e-3
    assert {name: figures[name] for name in fast} == fast, "the mode that was taken"
    fused = figures["fused_decoder"]
    assert 1e-9 < fused["logits"]["kl"] <= 1e-3
    assert fused["greedy"]["different"] == 0 and fused["greedy"]["tokens"] == 16


def test_export_alone(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    names = ["decoder_model_merged_q4.onnx", "vision_encoder.onnx"]
    assert config["transformers.js_config"]["use_external_data_format"] == dict.fromkeys(names, 1)
    assert not (exported / "gracec.json").exists()


def test_what_it_cannot_hold_is_refused(compiled: CompiledModel, tmp_path: Path) -> None:
    model = tiny_llava(intermediate_size=72)
    odd = {
        "model.language_model.layers.0.mlp.down_proj.weight": QuantSpec(granularity="per_channel")
    }
    artifact = random_artifact(odd, model=model)
    assert "a scale has 72 features" in Onnx().refusal(artifact)
    with pytest.raises(GracecError, match="format onnx: .*down_proj.*blocks of 16"):
        Onnx().write(artifact, tmp_path)
    assert Onnx().refusal(random_artifact({})) == "no weight is quantized"
    for options in ({"ops": "int4"}, {"mode": "exact"}):
        with pytest.raises(GracecError, match="unknown"):
            compiled.export_onnx(tmp_path / "never", **options)
    assert not (tmp_path / "never").exists()


def test_the_model_of_an_artifact(compiled: CompiledModel, batch: dict[str, Tensor]) -> None:
    artifact = artifact_of(compiled)
    for dtype in (torch.float32, torch.bfloat16):
        model = build(artifact, dtype)
        assert {p.dtype for p in model.parameters()} == {dtype}
        expected = artifacts.dense_model(artifact, dtype)
        found = dense_twin(artifact, dtype)
        logits = artifacts.logits_of(found, batch)
        assert torch.equal(logits, artifacts.logits_of(expected, batch))


@pytest.mark.slow
@pytest.mark.parametrize(("ops", "mode"), [("matmulnbits", "faithful"), ("qdq", "fast")])
def test_other_operators_and_modes(
    compiled: CompiledModel, tmp_path: Path, ops: str, mode: str
) -> None:
    compiled.export_onnx(tmp_path / "out", ops, mode)
    figures = json.loads((tmp_path / "out/onnx/session.json").read_text())["gates"]
    assert figures["int4_kernels"] == 14 and "modes" not in figures
    assert gracec.load(tmp_path / "out", backend="onnx").session_config.mode == mode


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 8])
def test_other_widths_and_other_parts(tmp_path: Path, bits: int) -> None:
    specs = {
        **decoder_specs(QuantSpec(bits, 32)),
        "model.multi_modal_projector.linear_1.weight": QuantSpec(4, 32, signed=True),
        "lm_head.weight": QuantSpec(8, 64),
    }
    artifact = random_artifact(specs)
    ops = "qdq" if bits == 8 else "matmulnbits"
    Onnx(ops).write(artifact, tmp_path)
    session = json.loads((tmp_path / "session.json").read_text())
    joined = {"fused_decoder": 9} if ops == "matmulnbits" else {}
    assert session["kernels"] == {"vision_encoder": 1, "embed_tokens": 0, "decoder": 15, **joined}
    assert session["minimum_runtime"] == ("1.31" if ops == "qdq" else "1.24")
    assert session["graphs"]["vision_encoder"] == "vision_encoder_q4.onnx"


@pytest.mark.parametrize(
    ("ops", "mode"), [("matmulnbits", "faithful"), ("qdq", "faithful"), ("matmulnbits", "fast")]
)
def test_negative_scales(tmp_path: Path, ops: str, mode: str) -> None:
    """Half of them: every gate holds, the weights read back, and the greedy tokens are those of
    the codes in torch."""
    artifact = random_artifact(decoder_specs(QuantSpec(4, 32, signed=True)))
    assert all((one.scales < 0).double().mean() > 0.3 for one in artifact.weights.values())
    Onnx(ops, mode).write(artifact, tmp_path)
    figures = json.loads((tmp_path / "session.json").read_text())["gates"]
    assert figures["int4_kernels"] == 14
    if mode == "faithful":
        assert figures["matmul_error"] <= 1e-6 and figures["logits"]["kl"] <= 1e-9
        assert figures["greedy"]["same"] == 2


@pytest.mark.slow
def test_the_shipped_student_gives_the_same_answers(tmp_path: Path) -> None:
    from emojivqa.packing import questions_of  # noqa: F401  (the example is importable)
    from make_dataset import write

    write("test", tmp_path / "data", 100)
    compiled = gracec.compile(STUDENT, "w4a16-ptq")
    compiled.export_onnx(tmp_path / "out", mode="faithful")
    samples = load_samples(tmp_path / "data")
    model = gracec.load(tmp_path / "out", backend="onnx")
    found = evaluate_vqa(model, model.processor, samples, blind=False)
    dense = dense_twin(artifact_of(compiled), torch.float32)
    expected = evaluate_vqa(dense, compiled.processor, samples, blind=False)
    assert [p.predicted for p in found.predictions] == [p.predicted for p in expected.predictions]


@pytest.fixture(scope="module")
def frozen_serving(compiled: CompiledModel, serving: dict[str, ServingProgram]) -> Serving:
    """The serving graphs of the original, with the codes of `compiled`."""
    return apply_codes(serving, compiled.weights)[0]


def test_graphs_that_compute_something_else_than_training_are_not_written(
    compiled: CompiledModel,
    serving: dict[str, ServingProgram],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of the original, whose other weights are not rounded to the dtype that runs."""
    monkeypatch.setattr(format_, "capture_serving", lambda model: serving)
    monkeypatch.setattr(Onnx, "_write_graphs", lambda *arguments: pytest.fail("written"))
    with pytest.raises(GateError, match="the serving graphs are off by .* from what training"):
        Onnx().write(artifact_of(compiled), tmp_path)


def test_everything_that_was_noted_is_told(
    compiled: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = (Note("lower-qdq", "14 weights run on INT4 kernels"), Note("fuse-decoder", "5 norms"))
    (tmp_path / "graph.onnx").touch()
    graph = WrittenGraph((tmp_path / "graph.onnx",), {}, 0, 0, notes)
    same = LogitAgreement(0.0, 1.0, 1.0)
    trial = mode.Trial(same, same, None, gates.TokenAgreement(2, 0, 0, 16))
    monkeypatch.setattr(Onnx, "_write_graphs", lambda *arguments: {"decoder": graph})
    monkeypatch.setattr(mode.Expected, "measure", lambda *arguments: trial)
    monkeypatch.setattr(Onnx, "_fuse", lambda one, config, *arguments: (config, ["no fused one"]))
    monkeypatch.setattr(runner, "OnnxModel", lambda *arguments, **options: None)
    monkeypatch.setattr(genai, "notes", lambda frozen: ["onnxruntime-genai: pictures are small"])
    told = replace(artifact_of(compiled), reference=None)  # which nothing was run for
    standard, fused, summary, small = Onnx(mode="faithful").write(told, tmp_path)
    assert (standard, fused) == ("fuse-decoder: 5 norms", "no fused one")
    assert summary.startswith("0 matmuls on INT4 kernels, KL 0 ")
    assert small == "onnxruntime-genai: pictures are small"


def test_a_weight_that_is_not_lowered_is_an_error(
    compiled: CompiledModel,
    frozen_serving: Serving,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nothing = WrittenGraph((tmp_path / "graph.onnx",), {}, 0, 0, ())
    monkeypatch.setattr(write, "write_graph", lambda *arguments, **options: nothing)
    with pytest.raises(GateError, match="decoder: 0 of 14 weights are lowered"):
        Onnx("qdq", "faithful")._write_graphs(
            artifact_of(compiled), frozen_serving, tmp_path, False
        )


def test_a_kernel_that_is_off_by_more_than_the_bound_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = {"w": lowered(QuantSpec(4, 32), "matmulnbits")}
    form = Onnx("matmulnbits", "faithful")
    assert form._kernel_figures(weights)["matmul_error"] > 0
    monkeypatch.setitem(kernel.ACCURACY_LEVEL, "faithful", 4)  # it rounds activations
    with pytest.raises(GateError, match="w: INT4 matmul is off by"):
        form._kernel_figures(weights)
