"""Training of models of any family, from nothing or from a checkpoint."""
