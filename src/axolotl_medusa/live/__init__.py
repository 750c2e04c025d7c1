"""Servers that run: what they say, what they accept, how fast they are under load."""
