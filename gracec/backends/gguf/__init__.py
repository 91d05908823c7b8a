"""GGUF: what llama.cpp and the programs around it load, a decoder and the projector of images."""

from gracec.backends.gguf.format import Gguf

__all__ = ["Gguf"]
