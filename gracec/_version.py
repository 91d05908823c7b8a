"""The version of gracec."""

__version__ = "0.1.0"
