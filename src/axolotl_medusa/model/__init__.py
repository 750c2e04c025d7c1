"""The model and its heads, in memory and on disk: what every other room stands on."""
