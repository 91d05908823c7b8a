"""The passes of the compiler, one file each."""

from gracec.passes.base import (
    PASSES,
    Pass,
    PassResult,
    PassRun,
    PipelineResult,
    all_passes,
    run_passes,
)
from gracec.passes.options import has_text_form
from gracec.passes.pipeline import Pipeline, Placed, parse_pipeline, parse_placed

__all__ = [
    "PASSES",
    "Pass",
    "PassResult",
    "PassRun",
    "Pipeline",
    "PipelineResult",
    "Placed",
    "all_passes",
    "has_text_form",
    "parse_pipeline",
    "parse_placed",
    "run_passes",
]
