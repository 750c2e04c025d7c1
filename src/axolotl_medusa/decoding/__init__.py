"""Decoding with heads: the model, the loop, candidate trees and what is accepted of them."""
