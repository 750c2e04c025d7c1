"""Losses over a vocabulary and their gradients: pure functions of tensors."""
