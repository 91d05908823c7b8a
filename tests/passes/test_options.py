"""What is printed of a pass is read back as the same pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, ClassVar, Optional, Union, get_args, get_origin

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject, SearchStrategy

from gracec.errors import GracecError
from gracec.ir.program import Program
from gracec.passes import Pass, PassResult, all_passes, has_text_form, parse_pipeline
from gracec.passes.apply_codes import ApplyCodes
from gracec.passes.insert_fake_quant import InsertFakeQuant
from gracec.passes.insert_observers import InsertObservers
from gracec.passes.options import Option, kind_name, options_of
from gracec.passes.plan_quantization import PlanQuantization
from gracec.recipe import Recipe


@dataclass(frozen=True)
class Everything(Pass):
    """A pass with an option of every kind that has a text form."""

    flag: bool = False
    number: int = 3
    share: float = 0.5
    word: str = "plain"
    limit: int | None = 7
    label: Optional[str] = None  # noqa: UP045
    either: Union[int, str, None] = 1  # noqa: UP007
    blocks: tuple[int, ...] = (0, -1)
    names: tuple[str, ...] = ()
    flags: tuple[bool, ...] | None = None
    mixed: tuple[int | str | None, ...] = ("none", None)
    name: ClassVar[str] = "everything"
    keeps_numerics: ClassVar[bool] = True

    def apply(self, program: Program) -> PassResult:
        return PassResult(program, False)


@dataclass(frozen=True)
class Needy(Everything):
    """One whose option has no default, beside one that only Python can give."""

    wanted: int = field(kw_only=True)
    weights: dict[str, int] = field(default_factory=dict)
    name: ClassVar[str] = "needy"


SCALARS: dict[Any, SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.integers(),
    float: st.floats(allow_nan=False),
    str: st.text() | st.sampled_from(["none", "true", "3", "1e5", "", "a;b", '"', "\\", "<...>"]),
    NoneType: st.none(),
}


def values(kind: Any) -> SearchStrategy[Any]:
    """Values of a kind that have a text form; none for other kinds."""
    if get_origin(kind) in (Union, UnionType):
        return st.one_of([values(choice) for choice in get_args(kind)])
    if get_origin(kind) is tuple:
        return st.lists(values(get_args(kind)[0]), max_size=3).map(tuple)
    return SCALARS.get(kind, st.nothing())


@settings(deadline=None)
@given(st.data())
@pytest.mark.parametrize("name", sorted(all_passes()))
def test_what_is_printed_is_read_back(name: str, data: DataObject) -> None:
    cls = all_passes()[name]
    options = {
        option.name: data.draw(values(option.kind), label=option.name)
        for option in options_of(cls).values()
        if option.has_text_form and (option.is_required or data.draw(st.booleans()))
    }
    item = cls(**options)
    assert has_text_form(item)
    assert parse_pipeline(str(item)) == (item,)
    assert len(str(item).splitlines()) == 1


@pytest.mark.parametrize(
    ("item", "text"),
    [
        (Everything(), "everything"),
        (Everything(flag=True, number=4), "everything{flag=true number=4}"),
        (Everything(share=1e-9, word="a/b-c.yaml"), "everything{share=1e-09 word=a/b-c.yaml}"),
        (Everything(word="two words"), 'everything{word="two words"}'),
        (Everything(word='say "a,b{c}"'), r'everything{word="say \"a,b{c}\""}'),
        (Everything(word="none", label="none"), 'everything{word=none label="none"}'),
        (Everything(limit=None, either="1"), 'everything{limit=none either="1"}'),
        (Everything(blocks=(), names=("",)), 'everything{blocks= names=""}'),
        (Everything(blocks=(1, 2, 3)), "everything{blocks=1;2;3}"),
        (Everything(names=("a", "b;c")), 'everything{names="a";"b;c"}'),
        (
            Everything(flags=(True, False), mixed=(1, None, "x")),
            "everything{flags=true;false mixed=1;none;x}",
        ),
        (Needy(wanted=1), "needy{wanted=1}"),
        (InsertFakeQuant(candidates=8, lowest=0.5), "insert-fake-quant{candidates=8 lowest=0.5}"),
    ],
)
def test_only_what_differs_from_the_default_is_printed(item: Pass, text: str) -> None:
    assert str(item) == text
    assert parse_pipeline(text) == (item,)


@pytest.mark.parametrize(
    ("item", "text"),
    [
        (PlanQuantization(Recipe.load("w4a16")), "plan-quantization{recipe=<...>}"),
        (ApplyCodes({"weight": torch.ones(2)}), "apply-codes{weights=<...>}"),  # type: ignore[dict-item]
        (InsertObservers([{"x": torch.ones(2)}]), "insert-observers{samples=<...>}"),
        (InsertFakeQuant(lowest=float("nan")), "insert-fake-quant{lowest=<...>}"),
        (Everything(blocks=((1,),)), "everything{blocks=<...>}"),  # type: ignore[arg-type]
        (Everything(number="3"), "everything{number=<...>}"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_text_is_printed_all_the_same(item: Pass, text: str) -> None:
    assert str(item) == text
    assert not has_text_form(item)
    with pytest.raises(GracecError, match=r"cannot be given as text; use Python"):
        parse_pipeline(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("insert-fake-quant{candidate=8}", "unknown option of insert-fake-quant 'candidate'; did"),
        ("insert-fake-quant{candidates=many}", "insert-fake-quant.candidates: 'many' is no int"),
        ("insert-fake-quant{candidates}", "option 'candidates' of insert-fake-quant needs a value"),
        ("insert-fake-quant{lowest=1 lowest=2}", "'lowest' of insert-fake-quant is given twice"),
        ("everything{flag=yes}", "everything.flag: 'yes' is no bool"),
        ("everything{limit=some}", "everything.limit: 'some' is no int | None"),
        ("everything{blocks=1;x}", "everything.blocks: '1;x' is no tuple[int, ...]"),
        ('everything{word="a"b}', "everything.word: '\"a\"b' is no str"),
        ('everything{names="a"b;c}', "everything.names: '\"a\"b;c' is no tuple[str, ...]"),
        ("needy", "option 'wanted' of needy is missing and has no default"),
        ("apply-codes{weights=x}", "option 'weights' of apply-codes cannot be given as text"),
        ("insert-observers{samples=x}", "option 'samples' of insert-observers cannot be given"),
    ],
)
def test_an_option_that_cannot_be_read_gives_one_line(text: str, message: str) -> None:
    with pytest.raises(GracecError) as error:
        parse_pipeline(text)
    assert message in str(error.value)


def test_a_flag_needs_no_value_and_a_name_may_have_hyphens() -> None:
    assert parse_pipeline("everything{flag}") == (Everything(flag=True),)
    assert Option("group_size", int, 1).read("8", "x") == 8
    assert kind_name(int | None) == "int | None"


def test_types_that_cannot_be_resolved_have_no_text_form() -> None:
    @dataclass(frozen=True)
    class Local:
        other: Nowhere = None  # type: ignore[name-defined]  # noqa: F821

    assert not options_of(Local)["other"].has_text_form
    assert has_text_form(Local()) and not has_text_form(Local(1))
