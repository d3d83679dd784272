"""What a sweep will take before it runs: memory and time per trial, from a short probe where trials run.

`probe` measures, `estimate` multiplies, `lines` says it. Knows nothing of Ray: `tuning.planning` runs the probe.
"""
