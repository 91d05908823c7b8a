"""The default pipelines of a compilation, as data, and where further passes go in them.

preparing    analyze-modality, plan-quantization, [insert-observers,] insert-fake-quant
learning     [insert-taps,] select-supervised
freezing     freeze
lowering     what the target and each format run: `Target.passes`, `Format.passes`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from gracec.errors import GracecError
from gracec.passes.analyze_modality import AnalyzeModality
from gracec.passes.base import Pass
from gracec.passes.freeze import Freeze
from gracec.passes.insert_fake_quant import InsertFakeQuant
from gracec.passes.insert_observers import InsertObservers
from gracec.passes.insert_taps import InsertTaps
from gracec.passes.pipeline import Pipeline
from gracec.passes.plan_quantization import PlanQuantization
from gracec.passes.select_supervised import SelectSupervised
from gracec.recipe import Recipe, Training
from gracec.registry import nearest
from gracec.request import Request

ANALYSIS: tuple[Pass, ...] = (AnalyzeModality(),)
"""What finds the parts of a vision-language model."""


def planning(
    recipe: Recipe, *, strict: bool = False, analysis: Sequence[Pass] = ANALYSIS
) -> Pipeline:
    """From a captured graph to a planned one."""
    return Pipeline((*analysis, PlanQuantization(recipe=recipe, strict=strict)))


def preparing(
    recipe: Recipe,
    samples: Sequence[Mapping[str, Tensor]] = (),
    *,
    strict: bool = False,
    analysis: Sequence[Pass] = ANALYSIS,
) -> Pipeline:
    """From a captured graph to a fake-quantized one.

    Args:
        samples: what to calibrate activations on, where the recipe quantizes any.
        analysis: what finds the parts of the model.
    """
    search = recipe.scale_search
    observers = [InsertObservers(samples)] if recipe.quantizes_activations else []
    return Pipeline(
        (
            *planning(recipe, strict=strict, analysis=analysis),
            *observers,
            InsertFakeQuant(search.candidates, search.lowest, search.highest),
        )
    )


def learning(rule: Training) -> Pipeline:
    """From a fake-quantized graph to one that is trained, and from an analysed teacher to one that
    teaches."""
    taps = [InsertTaps()] if rule.distillation.omega else []
    return Pipeline((*taps, SelectSupervised()))


def freezing() -> Pipeline:
    """From a fake-quantized graph to one with codes."""
    return Pipeline((Freeze(),))


def lowering_passes(request: Request) -> tuple[str, ...]:
    """The further passes of a request that are placed in the pipelines of its target and formats.

    They are kept with the codes, since lowering is done again whenever an artifact is loaded.

    Raises:
        GracecError: if a pass is placed next to one that is in no pipeline of this compilation.
    """
    earlier = [preparing(request.recipe), freezing()]
    earlier += [] if request.training is None else [learning(request.training)]
    left = request.further
    for pipeline in earlier:
        _, left = pipeline.placed(left)
    reached = {*request.target.passes, *(name for form in request.formats for name in form.passes)}
    for _ in left:  # one may stand next to another of them
        reached |= {one.item.name for one in left if one.anchor in reached}
    for one in left:
        if one.anchor not in reached:
            every = sorted(reached.union(*(pipeline.names for pipeline in earlier)))
            raise GracecError(
                f"there is no {one.anchor} in this compilation",
                where=f"further pass {one}",
                fix=nearest(one.anchor, every),
            )
    return tuple(map(str, left))
