"""From a training run to what a server loads: merged models, formats, exports and their checks."""
