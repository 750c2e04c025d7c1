"""What `axolotl-medusa doctor` looks at: versions, devices, missing packages, and whether heads fit their model."""
