"""A pipeline is read from text and printed back; passes leave it and further ones enter."""

import pytest

from gracec.errors import GracecError
from gracec.passes import Pipeline, Placed, parse_pipeline, parse_placed
from gracec.passes.freeze import Freeze
from gracec.passes.insert_fake_quant import InsertFakeQuant
from gracec.passes.insert_taps import InsertTaps
from gracec.passes.plan_quantization import PlanQuantization
from gracec.passes.strip import Strip

TEXT = "analyze-modality,plan-quantization{strict=true},insert-fake-quant{candidates=8}"
PLANNED = parse_pipeline("analyze-modality,plan-quantization,freeze")


def test_it_parses_from_text_and_prints_it() -> None:
    passes = parse_pipeline(
        " analyze-modality, plan-quantization {recipe=w4a16-ptq strict=true},\n"
        "insert-fake-quant{candidates=8}\n"
    )
    assert passes.names == ("analyze-modality", "plan-quantization", "insert-fake-quant")
    assert passes[1] == PlanQuantization(recipe="w4a16-ptq", strict=True)
    assert passes[2] == InsertFakeQuant(candidates=8)
    assert str(passes) == TEXT
    assert parse_pipeline(str(passes)) == passes
    assert str(Pipeline()) == ""


def test_quotes_hold_what_would_end_an_option() -> None:
    passes = Pipeline([PlanQuantization(recipe='my, "own" {recipe}.yaml'), Freeze()])
    assert parse_pipeline(str(passes)) == passes


@pytest.mark.parametrize("text", ["", "freeze{", "freeze}", "freeze,,strip", "freeze,", "a b"])
def test_a_bad_pipeline_gives_one_line(text: str) -> None:
    with pytest.raises(GracecError, match="cannot read the pipeline.*write it as pass,pass{opt"):
        parse_pipeline(text)


def test_an_unknown_pass_gives_the_nearest() -> None:
    with pytest.raises(GracecError, match="unknown pass 'frieze'; did you mean 'freeze'?"):
        parse_pipeline("strip,frieze")


def test_passes_are_left_out_by_name() -> None:
    assert str(PLANNED.without("freeze", "analyze-modality")) == "plan-quantization"
    assert parse_pipeline("strip,freeze,strip").without("strip") == (Freeze(),)
    assert PLANNED.without() == PLANNED


def test_what_is_not_there_cannot_be_left_out() -> None:
    with pytest.raises(GracecError, match="unknown pass 'frieze'; did you mean 'freeze'?"):
        PLANNED.without("frieze")
    with pytest.raises(GracecError) as error:
        PLANNED.without("lower-qdq")
    assert str(error.value) == (
        f"{PLANNED}: lower-qdq is not in the pipeline; "
        "known: analyze-modality, plan-quantization, freeze"
    )


def test_a_place_is_text() -> None:
    text = "insert-taps{block=-1} before freeze"
    placed = parse_placed(text)
    assert placed == Placed(InsertTaps(block=-1), "before", "freeze")
    assert str(placed) == text
    assert parse_placed("  strip\n after  freeze ") == Placed(Strip(), "after", "freeze")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("strip", "cannot read where the pass goes: 'strip'; write it as pass{option=value} after"),
        ("strip behind freeze", "cannot read where the pass goes: 'strip behind freeze'"),
        ("strip after", "cannot read where the pass goes"),
        ("strip,freeze after strip", "cannot read where the pass goes"),
        ("", "cannot read where the pass goes"),
        ("strip after frieze", "unknown pass 'frieze'; did you mean 'freeze'?"),
        ("stripe after freeze", "unknown pass 'stripe'; did you mean 'strip'?"),
        ("insert-taps{block=x} after freeze", "insert-taps.block: 'x' is no int"),
    ],
)
def test_a_place_that_cannot_be_read_gives_one_line(text: str, message: str) -> None:
    with pytest.raises(GracecError) as error:
        parse_placed(text)
    assert message in str(error.value)


def test_a_side_is_before_or_after() -> None:
    with pytest.raises(GracecError, match="strip: a pass is placed before or after another, not"):
        Placed(Strip(), "behind", "freeze")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("further", "expected"),
    [
        ([], "analyze-modality,plan-quantization,freeze"),
        (["strip after freeze"], "analyze-modality,plan-quantization,freeze,strip"),
        (["strip before analyze-modality"], "strip,analyze-modality,plan-quantization,freeze"),
        (
            ["strip after plan-quantization", "insert-taps after plan-quantization"],
            "analyze-modality,plan-quantization,strip,insert-taps,freeze",
        ),
        (
            ["strip before freeze", "insert-taps before freeze"],
            "analyze-modality,plan-quantization,strip,insert-taps,freeze",
        ),
        (
            ["strip after analyze-modality", "insert-taps before plan-quantization"],
            "analyze-modality,strip,insert-taps,plan-quantization,freeze",
        ),
        (
            [
                "strip after analyze-modality",
                "fuse-decoder before strip",
                "lower-qdq after strip",
                "insert-taps after analyze-modality",
            ],
            "analyze-modality,fuse-decoder,strip,lower-qdq,insert-taps,plan-quantization,freeze",
        ),
        (
            ["insert-taps after strip", "strip after freeze"],
            "analyze-modality,plan-quantization,freeze,strip,insert-taps",
        ),
    ],
)
def test_further_passes_stand_next_to_their_anchors(further: list[str], expected: str) -> None:
    pipeline, left = PLANNED.placed(map(parse_placed, further))
    assert (str(pipeline), left) == (expected, ())
    assert str(PLANNED) == "analyze-modality,plan-quantization,freeze"


def test_those_whose_anchor_is_elsewhere_are_left() -> None:
    texts = ["strip after lower-qdq", "insert-taps after freeze", "lower-torchao before strip"]
    further = [parse_placed(text) for text in texts]
    pipeline, left = PLANNED.placed(further)
    assert str(pipeline) == "analyze-modality,plan-quantization,freeze,insert-taps"
    assert left == (further[0], further[2])


def test_an_anchor_that_stands_twice() -> None:
    twice = parse_pipeline("strip,freeze,strip")
    further = [parse_placed("insert-taps before strip"), parse_placed("lower-qdq after strip")]
    assert str(twice.placed(further)[0]) == "insert-taps,strip,freeze,strip,lower-qdq"
