"""From hidden states and the output head to log-probabilities, losses and gradients."""
