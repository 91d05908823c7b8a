"""What a compilation did, as data and as tables."""

from gracec.report.report import Report, weight_bytes

__all__ = ["Report", "weight_bytes"]
