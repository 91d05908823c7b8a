"""The passes of the compiler, one file each."""

from gracec.passes.base import Pass, PassResult, all_passes, parse_pipeline, run_passes

__all__ = ["Pass", "PassResult", "all_passes", "parse_pipeline", "run_passes"]
