"""A captured model as a graph: the program, its text, what passes write on it, questions to it."""

from gracec.ir.program import Program, annotate, annotation
from gracec.ir.text import diff, format

__all__ = ["Program", "annotate", "annotation", "diff", "format"]
