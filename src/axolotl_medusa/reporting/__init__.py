"""One page about a run: what it logged, what was measured with its heads, and what its text looks like."""
