import pytest
import torch

from gracec import quant
from gracec.quant.ops import dequantize, fake_quantize, fake_quantize_activation


def example(parametrization: str = "log") -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    scales = quant.search_scales(weight, 4, 32) * 0.75  # small enough that some weights clip
    scales = quant.round_scale(scales, "bf16")
    return weight, quant.scale_to_param(scales, parametrization)


def half_negative(shape: torch.Size) -> torch.Tensor:
    """Signs of scales, int8."""
    signs = torch.ones(shape, dtype=torch.int8)
    signs.view(-1)[::2] = -1
    return signs


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("parametrization", ["log", "lsq"])
def test_fake_quantize_equals_quantize_then_dequantize(parametrization: str, signed: bool) -> None:
    weight, param = example(parametrization)
    signs = half_negative(param.shape) if signed else None
    scales = quant.scale_from_param(param, parametrization, "bf16", signs)
    assert (scales < 0).sum() == (8 if signed else 0)
    codes = quant.quantize(weight, scales, 4, 32)
    expected = dequantize(codes, scales, 32)
    found = fake_quantize(weight, param, 4, 32, parametrization, scale_signs=signs)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("parametrization", ["log", "lsq"])
def test_gradients_are_those_of_the_straight_through_composition(
    parametrization: str, signed: bool
) -> None:
    weight, param = example(parametrization)
    signs = half_negative(param.shape) if signed else None
    weight.requires_grad_()
    param.requires_grad_()
    upstream = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    fake_quantize(weight, param, 4, 32, parametrization, scale_signs=signs).backward(upstream)
    found = weight.grad, param.grad

    w = weight.detach().clone().requires_grad_()
    p = param.detach().clone().requires_grad_()
    scale = p.exp() if parametrization == "log" else p.abs()
    scale = scale if signs is None else scale * signs
    scale = scale + (quant.round_scale(scale, "bf16") - scale).detach()
    ratio = w.reshape(8, 2, 32) / scale.unsqueeze(-1)
    rounded = ratio + (ratio.round() - ratio).detach()
    clipped = torch.where(
        (ratio.round() > 7) | (ratio.round() < -8), ratio.round().clamp(-8, 7).detach(), rounded
    )
    assert (ratio.round() > 7).any()
    (clipped * scale.unsqueeze(-1)).reshape(8, 64).backward(upstream)
    lsq = (32 * 7) ** -0.5 if parametrization == "lsq" else 1.0
    torch.testing.assert_close(found[0], w.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], p.grad * lsq, rtol=1e-4, atol=1e-5)


def test_output_dtype_and_registration() -> None:
    weight, param = example()
    assert fake_quantize(weight, param, 4, 32, output_dtype="bfloat16").dtype == torch.bfloat16
    torch.library.opcheck(
        torch.ops.gracec.fake_quantize.default,
        (weight.requires_grad_(), param.requires_grad_(), 4, 32, "log", "bf16", "float32"),
    )
    torch.library.opcheck(
        torch.ops.gracec.fake_quantize.default,
        (weight, param, 4, 32, "log", "bf16", "float32", half_negative(param.shape)),
    )
    codes = quant.quantize(weight.detach(), torch.ones(8, 2), 4, 32)
    torch.library.opcheck(
        torch.ops.gracec.dequantize.default, (codes, torch.ones(8, 2), 32, "bfloat16")
    )


def test_backward_keeps_only_weight_and_scale() -> None:
    weight, param = example()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fake_quantize(weight.requires_grad_(), param.requires_grad_(), 4, 32)
    assert sorted(tensor.numel() for tensor in saved) == [16, 512]


@pytest.mark.parametrize("groups", [1, 4, 16])
@pytest.mark.parametrize("zero_point", [0, -37])
def test_activation_gradients_are_those_of_the_composition(groups: int, zero_point: int) -> None:
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(3)).requires_grad_()
    scales = quant.round_scale(torch.full((groups,), 0.013), "bf16")
    param = quant.scale_to_param(scales, "log").requires_grad_()
    zeros = torch.full((groups,), zero_point, dtype=torch.int32)
    upstream = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(4))
    found = fake_quantize_activation(x, param, zeros, 8)
    found.backward(upstream)
    grads = x.grad, param.grad

    y = x.detach().clone().requires_grad_()
    p = param.detach().clone().requires_grad_()
    scale = p.exp()
    scale = (scale + (quant.round_scale(scale, "bf16") - scale).detach()).repeat_interleave(
        16 // groups
    )
    ratio = y / scale
    rounded = ratio + (ratio.round() - ratio).detach()
    shifted = ratio.detach().round() + zero_point
    assert (shifted > 127).any()
    clipped = torch.where(
        (shifted > 127) | (shifted < -128), shifted.clamp(-128, 127) - zero_point, rounded
    )
    expected = clipped * scale
    expected.backward(upstream)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(grads[0], y.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads[1], p.grad, rtol=1e-4, atol=1e-5)
    torch.library.opcheck(
        torch.ops.gracec.fake_quantize_activation.default,
        (x.detach().requires_grad_(), param.detach().requires_grad_(), zeros, 8, "log", "bf16"),
    )


def test_one_scale_for_a_whole_weight_sums_its_gradient() -> None:
    weight, _ = example()
    param = torch.full((1, 1), -1.5, requires_grad=True)
    rows = torch.full((8, 1), -1.5, requires_grad=True)
    upstream = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    fake_quantize(weight, param, 4, 64).backward(upstream)
    fake_quantize(weight, rows, 4, 64).backward(upstream)
    torch.testing.assert_close(param.grad.sum(), rows.grad.sum())
