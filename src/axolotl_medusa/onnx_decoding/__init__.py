"""Medusa decoding in ONNX Runtime, without torch and transformers."""
