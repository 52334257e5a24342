"""The training loop: generators for the user's own, `fit`, and the metrics logged in it."""
