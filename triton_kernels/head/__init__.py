"""Log-probabilities, losses and gradients from hidden states and an output head, without logits."""
