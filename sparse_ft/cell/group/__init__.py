"""A cell run by a group of processes, each with a share of the model's parameters."""
