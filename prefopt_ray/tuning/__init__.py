"""Sweeps on Ray Tune: search, rungs, the trainable, run and resume."""
