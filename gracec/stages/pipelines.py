"""The default pipelines of a compilation, as data, and where further passes go in them.

preparing    analyze-modality, plan-quantization, [insert-observers,] [observe-second-moments,]
             insert-fake-quant, [correct-codes]
learning     [insert-taps,] select-supervised, return-head
freezing     freeze
lowering     what the target and each format run: `Target.passes`, `Format.passes`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from gracec.errors import GracecError
from gracec.passes.analyze_modality import AnalyzeModality
from gracec.passes.base import Pass
from gracec.passes.correct_codes import CorrectCodes, Progress
from gracec.passes.freeze import Freeze
from gracec.passes.insert_fake_quant import InsertFakeQuant
from gracec.passes.insert_observers import InsertObservers
from gracec.passes.insert_taps import InsertTaps
from gracec.passes.observe_second_moments import ObserveSecondMoments
from gracec.passes.pipeline import Pipeline
from gracec.passes.plan_quantization import PlanQuantization
from gracec.passes.return_head import ReturnHead
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


@dataclass(frozen=True)
class Observed:
    """Prepared inputs of a graph that it is calibrated on, without padding.

    Attributes:
        activations: that the ranges of activations are of, where the recipe quantizes any.
        moments: that decide on what an error of a weight counts.
        samples, held_out: that codes are corrected on, and compared on.
        progress: of that, and what is kept of it.
    """

    activations: Sequence[Mapping[str, Tensor]] = ()
    moments: Sequence[Mapping[str, Tensor]] = ()
    samples: Sequence[Mapping[str, Tensor]] = ()
    held_out: Sequence[Mapping[str, Tensor]] = ()
    progress: Progress | None = None


def preparing(
    recipe: Recipe,
    observed: Observed | None = None,
    *,
    strict: bool = False,
    analysis: Sequence[Pass] = ANALYSIS,
) -> Pipeline:
    """From a captured graph to a fake-quantized one, whose weights have codes where they were
    corrected.

    Args:
        observed: what to calibrate on; without it scales are those of the weights alone.
        analysis: what finds the parts of the model.
    """
    observed = observed or Observed()
    search, rule = recipe.scale_search, recipe.calibration
    grid = (search.candidates, search.lowest, search.highest)
    passes: list[Pass] = [*planning(recipe, strict=strict, analysis=analysis)]
    if recipe.quantizes_activations:
        passes.append(InsertObservers(observed.activations))
    if observed.moments:
        passes.append(ObserveSecondMoments(observed.moments))
    if not observed.samples:
        return Pipeline((*passes, InsertFakeQuant(*grid)))
    correct = CorrectCodes(
        observed.samples,
        observed.held_out,
        rule.damping,
        rule.order,
        None if rule.asymmetric == "auto" else rule.asymmetric,
        *grid,
        progress=observed.progress,
    )
    # What is corrected is searched again: one candidate will do where all of it is.
    insert = InsertFakeQuant(*grid) if observed.moments else InsertFakeQuant(1, 1.0, 1.0)
    return Pipeline((*passes, insert, correct))


def rounding(
    recipe: Recipe, *, strict: bool = False, analysis: Sequence[Pass] = ANALYSIS
) -> Pipeline:
    """From a captured graph to one whose weights are rounded to nearest, with the scale of the
    largest of each group: what everything else is compared with."""
    plain = recipe.with_rules(observer="min_max", signed=False)
    plain = plain.model_copy(update={"activations": {}})
    return Pipeline((*planning(plain, strict=strict, analysis=analysis), InsertFakeQuant()))


def learning(rule: Training, *, strict: bool = False) -> Pipeline:
    """From a fake-quantized graph to one that is trained, and from an analysed teacher to one that
    teaches."""
    taps = [InsertTaps()] if rule.distillation.omega else []
    return Pipeline((*taps, SelectSupervised(), ReturnHead(strict)))


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
