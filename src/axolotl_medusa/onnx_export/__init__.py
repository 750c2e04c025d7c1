"""Trained heads and their model as ONNX graphs, made with torch and checked against it."""
