"""The embedded example: two tiny checkpoints, a scorer, payloads, and the scenes all were made from."""
