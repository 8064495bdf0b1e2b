"""From teacher scores to the batches of a training."""
