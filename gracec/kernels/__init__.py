"""Codes and scales in the layout of a kernel, exactly."""
