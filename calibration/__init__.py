"""Calibration sequences and quantization of the language model."""
