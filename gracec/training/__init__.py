"""Quantization-aware training of a vision-language model, on its captured graph."""
