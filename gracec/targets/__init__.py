"""Targets: what runs a frozen model, one file each."""

from gracec.targets.base import AUTO, TARGETS, Runtime, Target, target_named

__all__ = ["AUTO", "TARGETS", "Runtime", "Target", "target_named"]
