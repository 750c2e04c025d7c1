"""What axolotl runs: the YAML keys, the plugin, the trainer, and the objective inside the model's forward."""
