"""Runtimes that codes and scales are lowered to, one module each."""
