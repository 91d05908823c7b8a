import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gracec import quant
from gracec.errors import GracecError
from gracec.quant import SCALE_MAX, SCALE_MIN, QuantSpec, codes
from gracec.quant.frozen import FrozenWeight, code_hash


def random_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 4),
    group_size=st.sampled_from(quant.SUPPORTED_GROUP_SIZES),
    bits=st.sampled_from(quant.SUPPORTED_BITS),
    exponent=st.integers(-12, 8),
    seed=st.integers(0, 1000),
)
def test_codes_are_in_range_and_quantizing_again_changes_nothing(
    rows: int, groups: int, group_size: int, bits: int, exponent: int, seed: int
) -> None:
    weight = random_weight(rows, groups * group_size, seed) * 2.0**exponent
    scales = quant.search_scales(weight, bits, group_size)
    codes = quant.quantize(weight, scales, bits, group_size)
    lowest, highest = quant.code_range(bits)
    assert codes.dtype == torch.int8
    assert codes.min() >= lowest
    assert codes.max() <= highest
    restored = quant.dequantize(codes, scales, group_size)
    assert torch.equal(quant.quantize(restored, scales, bits, group_size), codes)


def test_scales_are_exact_in_bfloat16_and_float16() -> None:
    weight = random_weight(64, 256) * torch.logspace(-9, 6, 64).unsqueeze(1)
    scales = quant.search_scales(weight, 4, 32)
    assert torch.equal(scales.to(torch.bfloat16).float(), scales)
    assert torch.equal(scales.to(torch.float16).float(), scales)


def test_a_scale_survives_its_parametrization() -> None:
    scales = quant.search_scales(random_weight(128, 512), 4, 64)
    for parametrization in ("log", "lsq"):
        param = quant.scale_to_param(scales, parametrization)
        assert torch.equal(quant.scale_from_param(param, parametrization, "bf16"), scales)


def test_a_negative_scale_survives_as_its_magnitude_and_its_sign() -> None:
    scales = torch.tensor([[-0.015625, 0.25], [3.0, -SCALE_MAX]])
    assert quant.scale_signs(scales).tolist() == [[-1, 1], [1, -1]]
    for parametrization in ("log", "lsq"):
        param = quant.scale_to_param(scales, parametrization)
        signs = quant.scale_signs(scales)
        assert torch.equal(quant.scale_from_param(param, parametrization, "bf16", signs), scales)
        assert torch.equal(quant.scale_from_param(param, parametrization, "bf16"), scales.abs())


@pytest.mark.parametrize("scale_grid", ["bf16", "fp32"])
def test_rounding_a_scale_keeps_its_sign(scale_grid: str) -> None:
    scales = random_weight(64, 16) * torch.logspace(-9, 6, 64).unsqueeze(1)
    found = quant.round_scale(scales, scale_grid)
    assert torch.equal(found, quant.round_scale(scales.abs(), scale_grid) * scales.sign())
    assert found.abs().min() == SCALE_MIN and found.abs().max() == SCALE_MAX
    for zero in (0.0, -0.0):  # what has no sign is positive
        assert quant.round_scale(torch.tensor(zero), scale_grid) == SCALE_MIN


def test_a_negative_scale_gives_the_lowest_code_to_the_other_side() -> None:
    weight = torch.tensor([[-7.0, 8.0] * 8, [-8.0, 7.0] * 8])
    scales = torch.tensor([[-1.0], [1.0]])
    codes = quant.quantize(weight, scales, 4, 16)
    assert codes[0, :2].tolist() == [7, -8] and codes[1, :2].tolist() == [-8, 7]
    assert torch.equal(quant.dequantize(codes, scales, 16), weight)
    assert torch.equal(quant.fake_quantize(weight, scales, 4, 16), weight)


def test_an_unsigned_spec_is_written_and_hashed_as_before_there_were_signed_ones() -> None:
    spec, signed = QuantSpec(4, 32), QuantSpec(4, 32, signed=True)
    assert spec.to_dict() == {
        "bits": 4,
        "group_size": 32,
        "parametrization": "log",
        "scale_grid": "bf16",
        "granularity": "per_group",
    }
    assert signed.to_dict() == {**spec.to_dict(), "signed": True}
    for one in (spec, signed):
        assert QuantSpec(**one.to_dict()) == one
    assert (str(spec), str(signed)) == ("int4/g32", "int4/g32/signed")
    codes = (torch.arange(128).reshape(2, 64) % 16 - 8).to(torch.int8)
    scales = torch.tensor([[2.0**-7, 2.0**-6], [2.0**-5, 2.0**-4]])
    found = code_hash(FrozenWeight.from_codes(codes, scales, spec))
    assert found == "5a5a9f3103266cfe4f2a2ff4573bb899cbe47bac205e9c6f7f38f0766b297ed8"
    assert code_hash(FrozenWeight.from_codes(codes, scales, signed)) != found


def test_searched_scales_beat_the_largest_weight_rule() -> None:
    weight = random_weight(64, 512)
    searched = quant.search_scales(weight, 4, 128)
    largest = quant.round_scale(weight.reshape(64, 4, 128).abs().amax(-1) / 7, "bf16")

    def squared_error(scales: torch.Tensor) -> float:
        codes = quant.quantize(weight, scales, 4, 128)
        return float((quant.dequantize(codes, scales, 128) - weight).square().mean())

    assert squared_error(searched) < 0.8 * squared_error(largest)


def test_search_is_the_same_however_it_is_chunked_and_matches_a_plain_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = random_weight(6, 64)
    whole = quant.search_scales(weight, 3, 32, candidates=16)
    with monkeypatch.context() as patch:
        patch.setattr(codes, "CHUNK_ELEMENTS", 1)  # a row at a time
        assert torch.equal(whole, quant.search_scales(weight, 3, 32, candidates=16))
    for row in range(6):
        for group in range(2):
            w = weight[row, group * 32 : (group + 1) * 32]
            best = min(
                (
                    quant.round_scale(w.abs().max() / 3 * f, "bf16")
                    for f in torch.linspace(0.3, 1.2, 16)
                ),
                key=lambda s: float(((w / s).round().clamp(-4, 3) * s - w).square().sum()),
            )
            assert whole[row, group] == best


def test_a_group_of_zeros_stays_zero() -> None:
    weight = torch.zeros(2, 64)
    scales = quant.search_scales(weight, 4, 32)
    assert torch.isfinite(scales).all()
    assert quant.quantize(weight, scales, 4, 32).count_nonzero() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    weight = random_weight(4, 64)
    weight[2, 5] = value
    with pytest.raises(GracecError, match="NaN or infinity"):
        quant.search_scales(weight, 4, 32)


def test_a_group_that_does_not_divide_is_refused() -> None:
    with pytest.raises(GracecError, match="group_size 64 does not divide the 96 input features"):
        quant.search_scales(random_weight(4, 96), 4, 64)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"bits": 5}, "5 bits are not supported"),
        ({"group_size": 48}, "group_size 48 is not supported"),
        ({"parametrization": "linear"}, "unknown parametrization"),
        ({"scale_grid": "fp8"}, "unknown scale_grid"),
    ],
)
def test_a_spec_refuses_what_is_not_supported(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(GracecError, match=reason):
        quant.QuantSpec(**fields)  # type: ignore[arg-type]


def test_signal_to_noise() -> None:
    reference = torch.ones(10)
    assert quant.signal_to_noise_db(reference, reference) == float("inf")
    assert quant.signal_to_noise_db(reference, reference * 0.9) == pytest.approx(20.0, abs=1e-4)


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
def test_nibbles_round_trip(rows: int, pairs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (rows, 2 * pairs), generator=generator).to(torch.int8)
    packed = quant.pack_nibbles(codes)
    assert packed.shape == (rows, pairs)
    assert torch.equal(quant.unpack_nibbles(packed), codes)


def test_the_low_nibble_comes_first() -> None:
    codes = torch.tensor([[1, -2]], dtype=torch.int8)
    assert quant.pack_nibbles(codes).tolist() == [[0x01 | 0xE0]]
