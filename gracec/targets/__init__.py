"""Targets: what runs a frozen model, one file each."""

from gracec.targets.base import TARGETS, Runtime, Target, target_named

__all__ = ["TARGETS", "Runtime", "Target", "target_named"]
