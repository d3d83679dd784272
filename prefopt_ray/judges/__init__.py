"""Judges of completions: what they are asked, how their answers become win rates and strengths."""
