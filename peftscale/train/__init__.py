"""Training: the step, its collectives, optimizers, evaluation, checkpoints, and a worker's whole life."""
