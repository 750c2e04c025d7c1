"""What a training run will need, computed from its YAML and the model's config alone."""
