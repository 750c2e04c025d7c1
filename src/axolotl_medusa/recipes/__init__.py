"""A YAML for a model of one's own, and the commands around it."""
