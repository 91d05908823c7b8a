"""The observers of `gracec.quant.observers`, under their public name."""

from gracec.quant.observers import OBSERVERS, ActivationSpec, Observer, weight_scales

__all__ = ["OBSERVERS", "ActivationSpec", "Observer", "weight_scales"]
