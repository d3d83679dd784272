"""Engines own weights, adapter slots and optimizers. They compute PairStats; losses live elsewhere."""
