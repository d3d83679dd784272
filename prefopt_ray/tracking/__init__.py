"""Tracking: a journal of what happened, shipped to MLflow, and the links to look at it."""
