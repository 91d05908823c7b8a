"""freeze holds the codes to the fake-quantized graph, and says what it did."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import LlavaForConditionalGeneration

from gracec.errors import GateError
from gracec.ir.program import Program
from gracec.journal import Equal, Journal
from gracec.passes import PassResult
from gracec.passes.freeze import Freeze
from gracec.request import Request
from gracec.stages.freeze import freeze
from gracec.stages.prepare import Prepared
from gracec.stages.source import load_source

After = Callable[[str], Program]
FAKE = "analyze-modality,plan-quantization,insert-fake-quant"
CODES = "model.model.language_model.layers.1.mlp.down_proj.weight_codes"


@pytest.fixture(scope="module")
def request_(llava: LlavaForConditionalGeneration) -> Request:
    return Request.checked(llava, "w4a16-ptq")


@pytest.fixture(scope="module")
def prepared(llava: LlavaForConditionalGeneration, request_: Request, after: After) -> Prepared:
    source = load_source(llava, request_, Journal())
    return Prepared(source, source.model, after(FAKE))


def test_what_it_found_and_said_is_in_the_journal(prepared: Prepared, request_: Request) -> None:
    journal = Journal()
    frozen = freeze(prepared, request_, journal)
    assert journal.figures == {"frozen_equals_fake_quantized": Equal(1, "outputs")}
    (note,) = journal.notes
    assert str(note) == f"freeze: {len(frozen.weights)} weights frozen to codes"


def test_one_code_that_is_off_by_one_is_an_error(
    prepared: Prepared, request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = Freeze.apply

    def off_by_one(item: Freeze, program: Program) -> PassResult:
        result = apply(item, program)
        codes = result.program.tensor(CODES).clone()
        codes[0, 0] ^= 1  # the lowest bit of the first code
        result.program.set_tensor(CODES, codes)
        return result

    monkeypatch.setattr(Freeze, "apply", off_by_one)
    with pytest.raises(GateError, match="frozen and fake-quantized logits differ by"):
        freeze(prepared, request_, Journal())
