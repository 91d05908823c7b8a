"""Modules that are no vision-language models: captured, trained by a loss of one's own, written."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

from gracec import module as module_
from gracec.backends.onnx import gates as onnx_gates
from gracec.capture import module as capture_module_
from gracec.capture.capture import trace
from gracec.errors import GateError, GracecError
from gracec.ir.program import Program
from gracec.module import (
    capture_module,
    export_module,
    freeze_module,
    prepare_module,
    quantize_module,
)
from gracec.passes.freeze import frozen_weights
from gracec.passes.insert_fake_quant import fake_quantized
from gracec.recipe import Recipe
from tests.frozen_graphs import linear_graph
from tests.nets import conv_net
from tests.signed import with_halves_negative

DYNAMIC = {"x": {0: "batch_size"}}


def recipe(**rule: Any) -> Recipe:
    return Recipe.from_dict({"name": "test", "weights": {"module": rule}})


EIGHT_BITS = recipe(bits=8, granularity="per_channel")


class Conditioned(nn.Module):
    """A net with a number beside its image, and two results."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 32)

    def forward(self, x: Tensor, strength: Tensor) -> dict[str, Tensor]:
        y = self.linear(x)
        return {"mixed": strength * y + (1 - strength) * x[..., :32], "plain": y}


class Denoiser(nn.Module):
    """A net for images that is told how noisy they are, and how strongly to act.

    The step is embedded by waves and scales the channels; `gain` is a number of Python.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.embed = nn.Linear(32, 16)
        self.last = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor, step: Tensor, strength: Tensor, gain: float = 2.0) -> Tensor:
        waves = step * torch.logspace(0, -3, 16)
        scale = self.embed(torch.cat([waves.sin(), waves.cos()]))
        hidden = functional.silu(self.first(x)) * (1 + scale[:, None, None])
        denoised: Tensor = x - gain * strength * self.last(hidden)
        return denoised


def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=4,
    )
    return ViTForImageClassification(config).eval()


def textures(count: int, size: int = 16) -> tuple[Tensor, Tensor]:
    """Noise with stripes across, stripes down, a chessboard or nothing, and which of them."""
    generator = torch.Generator().manual_seed(count)
    images = torch.randn(count, 3, size, size, generator=generator)
    labels = torch.randint(0, 4, (count,), generator=generator)
    down, across = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    patterns = torch.stack([down % 2, across % 2, (down + across) % 2, 0 * down]) - 0.5
    return images + patterns[labels, None], labels


def run(path: Path, figures: dict[str, Any], **inputs: Tensor) -> list[Tensor]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    for key, value in figures["session_options"].items():
        options.add_session_config_entry(key, value)
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return [torch.from_numpy(output) for output in found]


def train(student: Program, name: str, steps: int) -> list[float]:
    images, labels = textures(64)
    optimizer = torch.optim.Adam(student.graph_module.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = functional.cross_entropy(student(**{name: images})[0], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("bits", "signed"), [(8, False), (4, False), (8, True), (4, True)])
def test_a_convolutional_net(bits: int, signed: bool, tmp_path: Path) -> None:
    net, (images, labels) = conv_net(), textures(256)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    student = prepare_module(
        net,
        {"x": images[:2]},
        recipe(bits=bits, granularity="per_channel", signed=signed),
        dynamic_shapes=DYNAMIC,
    )
    assert {fake.fqn for fake in fake_quantized(student)} == {
        *("first.weight", "depthwise.weight", "second.weight", "head.weight")
    }
    losses = train(with_halves_negative(student), "x", 60)
    for fake in fake_quantized(student):
        for part in (fake.fqn, fake.scale_fqn):
            gradient = student.tensor(part).grad
            assert gradient is not None and gradient.abs().sum() > 0, part
    assert losses[-1] < losses[0] / 2
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())

    frozen = freeze_module(student)
    with torch.no_grad():
        (logits,) = frozen(x=images)
    assert (logits.argmax(-1) == labels).double().mean() > 0.95
    weights = frozen_weights(frozen)
    assert weights["depthwise.weight"].shape == (16, 9)
    assert weights["second.weight"].scales.shape == (32, 1)
    assert all((weight.scales < 0).any() == signed for weight in weights.values())
    figures = export_module(frozen, tmp_path / "net.onnx")
    assert figures["equal_weights"] == 4 and figures["kernels"] == 1
    (found,) = run(tmp_path / "net.onnx", figures, x=images)
    assert torch.allclose(found, logits, rtol=1e-4, atol=1e-5)
    graph = onnx.load(str(tmp_path / "net.onnx")).graph
    codes = {
        tensor.name: tensor.data_type for tensor in graph.initializer if "codes" in tensor.name
    }
    kind = onnx.TensorProto.INT4 if bits == 4 else onnx.TensorProto.UINT8
    assert codes["first.weight.codes"] == kind
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net.onnx"]


def test_a_classifier_of_transformers(tmp_path: Path) -> None:
    images, _ = textures(5)
    student = prepare_module(
        vit(),
        {"pixel_values": images[:2]},
        recipe(bits=4, group_size=32),
        dynamic_shapes={"pixel_values": {0: "batch_size"}},
        strict=True,
    )
    assert student.output_names == ("logits",)
    losses = train(student, "pixel_values", 30)
    assert losses[-1] < losses[0]
    frozen = freeze_module(student)
    with torch.no_grad():
        (logits,) = frozen(pixel_values=images)
    for ops in ("qdq", "matmulnbits"):
        path = tmp_path / f"{ops}.onnx"
        figures = export_module(frozen, path, ops=ops, strict=True)
        assert figures["kernels"] == 7 and figures["equal_weights"] == 8
        (found,) = run(path, figures, pixel_values=images)
        assert torch.allclose(found, logits, rtol=1e-4, atol=1e-5)


def test_a_number_and_several_results(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(3, 64), "strength": torch.tensor(0.25)}
    student = prepare_module(Conditioned(), inputs, EIGHT_BITS, dynamic_shapes={"x": {0: "rows"}})
    assert student.output_names == ("mixed", "plain")
    frozen = freeze_module(student)
    figures = export_module(frozen, tmp_path / "net.onnx")
    other = {"x": torch.randn(7, 64), "strength": torch.tensor(0.75)}
    for one, found in zip(
        frozen(**other), run(tmp_path / "net.onnx", figures, **other), strict=True
    ):
        assert torch.allclose(one, found, rtol=1e-4, atol=1e-5)
    value = onnx.load(str(tmp_path / "net.onnx")).graph.input[0]
    assert value.type.tensor_type.shape.dim[0].dim_param == "rows"


def test_numbers_beside_an_image(tmp_path: Path) -> None:
    """A whole number and a fraction that condition the net stay inputs, whatever their values were
    when it was captured; a default that is a number of Python is that number."""
    torch.manual_seed(0)
    net, images = Denoiser().eval(), textures(3)[0]
    example = {"x": images[:2], "step": torch.tensor(10), "strength": torch.tensor(0.5)}
    program = capture_module(net, example, DYNAMIC)
    assert list(program.example_inputs) == ["x", "step", "strength"]
    values = [(10, 0.5), (11, 0.5), (10, 0.25), (0, 1.0), (999, 0.0), (1, -3.5)]
    found = []
    for step, strength in values:
        given = {"x": images, "step": torch.tensor(step), "strength": torch.tensor(strength)}
        with torch.no_grad():
            found.append(program(**given)[0])
            assert torch.equal(found[-1], net(**given)), (step, strength)
    assert torch.equal(found[values.index((999, 0.0))], images)
    differences = [(a - b).abs().max() for a, b in pairwise(found)]
    assert min(differences) > 1e-3

    student = prepare_module(net, example, EIGHT_BITS, dynamic_shapes=DYNAMIC, strict=True)
    frozen = freeze_module(student)
    figures = export_module(frozen, tmp_path / "net.onnx")
    for step, strength in values:
        given = {"x": images, "step": torch.tensor(step), "strength": torch.tensor(strength)}
        with torch.no_grad():
            (expected,) = frozen(**given)
        (result,) = run(tmp_path / "net.onnx", figures, **given)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_a_kernel_is_reported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 8))
    frozen = freeze_module(prepare_module(net, {"input": torch.randn(2, 20)}, EIGHT_BITS))
    with pytest.raises(GracecError, match="0.weight: .*takes blocks of 16, a scale has 20"):
        export_module(frozen, tmp_path / "net.onnx", strict=True)
    figures = export_module(frozen, tmp_path / "net.onnx")
    assert any("0.weight runs dense" in note for note in figures["notes"])


class Grouped(nn.Module):
    """Convolutions whose groups see other channels, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.groups = nn.Conv2d(16, 32, 3, stride=2, groups=4, bias=False)
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.groups(functional.relu(self.first(x))))
        outputs: Tensor = self.head(x.mean((2, 3)))
        return outputs


def grouped() -> Grouped:
    torch.manual_seed(0)
    return Grouped().eval()


SAMPLES = [{"x": textures(count)[0]} for count in (8, 9, 10)]
HELD_OUT = [{"x": textures(11)[0]}]
FOUR_BITS = recipe(bits=4, granularity="per_channel")


def output_error(program: Program, net: nn.Module) -> float:
    x = textures(64)[0]
    with torch.no_grad():
        expected = net(x)
        return float((program(x=x)[0] - expected).square().sum() / expected.square().sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_that_samples_correct_are_better_than_those_of_weights_alone(
    bits: int, tmp_path: Path
) -> None:
    net, x = grouped(), SAMPLES[0]["x"]
    rule = recipe(bits=bits, granularity="per_channel", signed=True)
    alone = freeze_module(prepare_module(net, {"x": x}, rule, dynamic_shapes=DYNAMIC))
    given = (net, {"x": x}, rule, SAMPLES)
    frozen = quantize_module(*given, held_out=HELD_OUT, dynamic_shapes=DYNAMIC, strict=True)
    assert output_error(frozen, net) < 0.5 * output_error(alone, net)
    assert set(frozen_weights(frozen)) == {"first.weight", "groups.weight", "head.weight"}
    assert "codes of 3 weights corrected on 3 samples" in [note.text for note in frozen.notes]
    found = re.fullmatch(
        r"outputs are off by (\S+) of their energy, plain rounding by (\S+)", frozen.notes[-1].text
    )
    assert found and float(found[1]) < 0.5 * float(found[2])
    figures = export_module(frozen, tmp_path / "net.onnx")
    assert figures["equal_weights"] == 3
    (logits,) = run(tmp_path / "net.onnx", figures, x=x)
    with torch.no_grad():
        torch.testing.assert_close(logits, frozen(x=x)[0], rtol=1e-4, atol=1e-5)


def test_training_starts_from_the_weights_on_the_scales_that_samples_give() -> None:
    net, x = grouped(), SAMPLES[0]["x"]
    options: dict[str, Any] = {"held_out": HELD_OUT, "dynamic_shapes": DYNAMIC}
    student = prepare_module(net, {"x": x}, FOUR_BITS, SAMPLES, **options)
    frozen = frozen_weights(quantize_module(net, {"x": x}, FOUR_BITS, SAMPLES, **options))
    alone = {
        fake.fqn: fake.scales
        for fake in fake_quantized(prepare_module(net, {"x": x}, FOUR_BITS, dynamic_shapes=DYNAMIC))
    }
    for fake in fake_quantized(student):
        own = net.get_parameter(fake.fqn).detach().flatten(1)
        assert torch.equal(fake.weight, own)
        assert torch.equal(fake.scales, frozen[fake.fqn].scales)
        assert not torch.equal(fake.scales, alone[fake.fqn])
    losses = train(student, "x", 20)
    assert losses[-1] < losses[0]
    freeze_module(student)


def test_moments_of_samples_weigh_scales() -> None:
    net, x = grouped(), SAMPLES[0]["x"]
    weighed = Recipe.from_dict(
        {
            "name": "test",
            "weights": {"module": {"bits": 4, "granularity": "per_channel"}},
            "calibration": {"method": "moments"},
        }
    )
    frozen = quantize_module(net, {"x": x}, weighed, SAMPLES, dynamic_shapes=DYNAMIC)
    alone = freeze_module(prepare_module(net, {"x": x}, FOUR_BITS))
    assert output_error(frozen, net) < output_error(alone, net)
    assert "3 inputs observed on 3 samples" in [note.text for note in frozen.notes]


def test_one_scale_of_a_whole_weight_is_searched_for() -> None:
    net, x = grouped(), SAMPLES[0]["x"]
    whole = recipe(bits=8, granularity="per_tensor")
    frozen = quantize_module(net, {"x": x}, whole, SAMPLES, dynamic_shapes=DYNAMIC, strict=True)
    assert {tuple(weight.scales.shape) for weight in frozen_weights(frozen).values()} == {(1, 1)}
    alone = freeze_module(prepare_module(net, {"x": x}, whole))
    assert output_error(frozen, net) < output_error(alone, net)


@pytest.mark.parametrize(
    ("method", "samples", "message"),
    [
        ("gptq", [], "recipe test: calibration by gptq needs samples; pass samples="),
        ("moments", [], "recipe test: calibration by moments needs samples"),
        ("weights", SAMPLES, "recipe test: calibration by weights looks at no samples"),
        ("auto", [{"y": SAMPLES[0]["x"]}], "sample 0: has inputs y, the module has x"),
        ("auto", SAMPLES[1:], r"sample 0: x has shape \[9, 3, 16, 16\], the example has \[8, 3"),
    ],
)
def test_samples_that_do_not_fit_are_refused(
    method: str, samples: list[dict[str, Tensor]], message: str
) -> None:
    fields = {"name": "test", "weights": {"module": {"bits": 8, "granularity": "per_channel"}}}
    rule = Recipe.from_dict({**fields, "calibration": {"method": method}})
    with pytest.raises(GracecError, match=message):
        prepare_module(grouped(), SAMPLES[0], rule, samples)


def test_quantizing_needs_samples() -> None:
    with pytest.raises(GracecError, match="there are no samples; give some, or use prepare_module"):
        quantize_module(grouped(), SAMPLES[0], FOUR_BITS, [])


def test_outputs_that_are_worse_than_rounded_ones_are_an_error_in_strict_mode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module_, "rounding", lambda recipe, analysis: analysis)  # rounds nothing
    given = grouped(), SAMPLES[0], FOUR_BITS, SAMPLES[:1]
    with pytest.raises(GateError, match="outputs are off by .*, plain rounding by 0; give more"):
        quantize_module(*given, strict=True)
    assert quantize_module(*given).notes[-1].text.endswith("plain rounding by 0")


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 0 else x


class Doubling(nn.Module):
    """Counts rows when it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.rows = 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += 1
        y: Tensor = self.linear(x) * self.rows
        return y


@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_that_keeps_its_precision_is_written(bias: bool, tmp_path: Path) -> None:
    """Three channels of 3 x 3 are 27 columns, which no group of 32 divides."""
    torch.manual_seed(0)
    first = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=bias)
    net = nn.Sequential(first, nn.ReLU(), nn.Conv2d(16, 32, (1, 2))).eval()
    x = torch.randn(2, 3, 16, 16)
    program = prepare_module(net, {"input": x}, recipe(bits=4, group_size=32))
    assert any("27" in str(note) for note in program.notes)
    frozen = freeze_module(program)
    assert list(frozen_weights(frozen)) == ["2.weight"]
    figures = export_module(frozen, tmp_path / "net.onnx")
    assert figures["output_error"] < 1e-5
    session = ort.InferenceSession(tmp_path / "net.onnx")
    (found,) = session.run(None, {"input": x.numpy()})
    expected = program(input=x)[0].detach()
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


class Tokens(nn.Module):
    """A vision transformer of torch's own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(48, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(self.patches(x)).mean(1))
        return logits


def test_layers_of_torch_with_a_fast_path(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Tokens().eval(), torch.randn(2, 9, 48)
    sizes = {"x": {0: "batch_size"}}
    fast = torch.backends.mha.get_fastpath_enabled()
    program = prepare_module(net, {"x": x}, recipe(bits=4, group_size=16), dynamic_shapes=sizes)
    assert torch.backends.mha.get_fastpath_enabled() is fast
    with torch.no_grad():
        exact = net(x)
    assert (program(x=x)[0] - exact).abs().max() < 0.1 * exact.abs().max()
    frozen = freeze_module(program)
    assert len(frozen_weights(frozen)) == 2 * 4 + 2  # in, out and two of each layer; both ends
    figures = export_module(frozen, tmp_path / "net.onnx", ops="matmulnbits")
    assert figures["output_error"] < 1e-4


def test_what_is_refused(tmp_path: Path) -> None:
    x = {"x": torch.randn(2, 16)}
    with pytest.raises(GracecError, match=r"Branching at .*test_module.py:\d+: torch.export"):
        capture_module(Branching(), x)
    with pytest.raises(GateError, match="output of the captured graph differs"):
        capture_module(Doubling(), x)
    with pytest.raises(GracecError, match=r"example_inputs\['strength'\]: the input is a float"):
        capture_module(Conditioned(), {"x": torch.randn(2, 64), "strength": 0.5})  # type: ignore[dict-item]
    with pytest.raises(GracecError, match="no input is called 'y'; the inputs are x"):
        capture_module(Branching(), x, {"y": {0: "n"}})
    with pytest.raises(GracecError, match="the module has no weights"):
        capture_module(nn.ReLU(), {"input": torch.randn(2)})
    with pytest.raises(GracecError, match="recipe w4a16-ptq: decoder says nothing about a module"):
        prepare_module(conv_net(), {"x": textures(1)[0]}, "w4a16-ptq")
    with pytest.raises(GracecError, match="no matmul and no convolution has a weight"):
        prepare_module(nn.BatchNorm1d(4).eval(), {"input": torch.randn(3, 4)}, EIGHT_BITS)


class FirstTwo(nn.Module):
    """A linear of two rows, however many are given."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = self.linear(input[:2])
        return y


def test_a_graph_that_is_right_at_the_example_alone_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def short(model: nn.Module, module: nn.Module, *more: Any) -> Program:
        wrong = FirstTwo(model)
        return trace(wrong, wrong, *more)

    net, example = nn.Linear(16, 16), {"input": torch.randn(2, 16)}
    monkeypatch.setattr(capture_module_, "trace", short)
    with pytest.raises(GateError, match=r"output .* differs .* at \{'input': \(4, 16\)\}"):
        capture_module(net, example, {"input": {0: "rows"}})


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (module_.OUTPUT_BOUND, "output in ONNX Runtime is off by .* of the largest value"),
        (onnx_gates.MATMUL_BOUND, "INT4 matmul is off by .* relative to float64"),
    ],
    ids=["outputs", "matmuls"],
)
def test_what_is_off_by_more_than_the_bound_is_not_written(
    bounds: dict[str, float], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = linear_graph()
    export_module(program, tmp_path / "good.onnx")
    monkeypatch.setitem(bounds, "faithful", -1.0)
    with pytest.raises(GateError, match=message):
        export_module(program, tmp_path / "net.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["good.onnx"]


def test_what_the_passes_say_is_in_the_notes() -> None:
    student = prepare_module(conv_net(), {"x": textures(2)[0]}, EIGHT_BITS)
    sources = [note.source for note in student.notes]
    assert {"flatten-convolutions", "plan-quantization", "insert-fake-quant"} <= {*sources}
    frozen = freeze_module(student)
    assert [note.source for note in frozen.notes] == [*sources, "freeze"]
    assert frozen.notes[-1].text == "4 weights frozen to codes"
