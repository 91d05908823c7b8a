import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from gracec.backends.onnx import graphs
from gracec.capture.serving import ServingProgram
from gracec.errors import GracecError

Serving = dict[str, ServingProgram]
TOTAL = "past_sequence_length + sequence_length"


def shapes(values: object) -> dict[str, list[str | int]]:
    return {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in values  # type: ignore[attr-defined]
    }


def test_names_and_symbols_are_those_of_the_serving_graph(exported: Path) -> None:
    model = onnx.load(str(exported / "onnx/decoder_model_merged_q4.onnx"))
    inputs, outputs = shapes(model.graph.input), shapes(model.graph.output)
    assert inputs["inputs_embeds"] == ["batch_size", "sequence_length", 64]
    assert inputs["attention_mask"] == ["batch_size", TOTAL]
    assert inputs["num_logits_to_keep"] == []
    assert inputs["past_key_values.1.value"] == ["batch_size", 2, "past_sequence_length", 16]
    assert outputs["logits"] == ["batch_size", "num_logits", 128]
    assert outputs["present.0.key"] == ["batch_size", 2, TOTAL, 16]
    vision = onnx.load(str(exported / "onnx/vision_encoder.onnx"))
    assert shapes(vision.graph.input) == {"pixel_values": ["batch_size", 3, 32, 32]}
    assert shapes(vision.graph.output) == {"image_features": ["num_image_tokens", 64]}


def test_standard_operators_only(exported: Path) -> None:
    for path in (exported / "onnx").glob("*.onnx"):
        model = onnx.load(str(path))
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 23)]


def test_tensors_have_the_names_of_the_model(exported: Path) -> None:
    model = onnx.load(str(exported / "onnx/decoder_model_merged_q4.onnx"))
    names = {tensor.name for tensor in model.graph.initializer}
    layer = "model.language_model.layers.1"
    assert f"{layer}.mlp.down_proj.weight.codes" in names
    assert f"{layer}.mlp.down_proj.weight.scales" in names
    # The other norms of this model are the same ones, and stored once.
    assert "model.language_model.layers.0.input_layernorm.weight" in names


def test_nothing_says_where_it_was_made(exported: Path) -> None:
    places = [str(Path.cwd()), str(Path(graphs.__file__).parents[3]), sys.prefix, "/tmp", ".py"]
    for path in (exported / "onnx").glob("*.onnx"):
        text = path.read_bytes()
        assert not [place for place in places if place.encode() in text]
        assert onnx.load(str(path), load_external_data=False).producer_name == "gracec"


SCRIPT = """
import sys
from pathlib import Path
from gracec.backends.onnx.graphs import to_onnx, write_model
from gracec.capture import capture_serving
from tests.tiny import tiny_llava

serving = capture_serving(tiny_llava(tie=True))
for name in ("vision_encoder", "embed_tokens"):
    write_model(to_onnx(serving[name], name), Path(sys.argv[1]) / f"{name}.onnx")
"""


@pytest.mark.slow
def test_equal_models_give_equal_bytes_in_every_process(exported: Path, tmp_path: Path) -> None:
    files = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}
        subprocess.run(
            [sys.executable, "-c", SCRIPT, str(folder)], check=True, env=environment, timeout=600
        )
        files.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert files[0] == files[1]


def test_small_tensors_stay_in_the_graph(serving: Serving, tmp_path: Path) -> None:
    model = graphs.to_onnx(serving["embed_tokens"], "embed_tokens")
    assert graphs.write_model(model, tmp_path / "a.onnx") == [tmp_path / "a.onnx"]
    again = graphs.to_onnx(serving["embed_tokens"], "embed_tokens")
    graphs.write_model(again, tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_shared_codes_are_copied() -> None:
    """torch.onnx may find that two tensors are equal; the runtime fuses nothing that is shared."""
    codes, scales = (
        ir.Value(name=name, const_value=ir.tensor(array), shape=ir.Shape(array.shape))
        for name, array in (
            ("w.codes", np.full((16, 2), 0x21, dtype=np.uint8)),
            ("w.scales", np.ones((1, 4), dtype=np.float32)),
        )
    )
    nodes = [
        ir.node("DequantizeLinear", [codes, scales], {"block_size": 16}, domain="gracec")
        for _ in range(2)
    ]
    graph = ir.Graph([], [], nodes=nodes, initializers=[codes, scales], opset_imports={"": 21})
    for node in nodes:
        graphs._standard_dequantize(graph, node)
    assert len({value for node in nodes for value in node.inputs}) == 4
    for node in nodes:
        assert node.inputs[0] is not None and node.inputs[0].const_value is not None
        assert node.inputs[0].const_value.numpy().astype(int).tolist() == [[1, 2, 1, 2]] * 16


def test_what_torch_cannot_translate_is_one_line(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "translations", dict)
    with pytest.raises(GracecError, match="decoder: torch.onnx cannot translate") as caught:
        graphs.to_onnx(serving["decoder"], "decoder")
    assert "\n" not in str(caught.value)
