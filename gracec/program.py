"""`Program` and its annotations, under their public name; they are `gracec.ir`'s."""

from gracec.ir.program import DynamicShapes, Program, annotate, annotation, drop_assertions

__all__ = ["DynamicShapes", "Program", "annotate", "annotation", "drop_assertions"]
