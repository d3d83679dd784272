"""Measures: pure functions that turn PairStats and stored histories into numbers, verdicts and comparisons."""
