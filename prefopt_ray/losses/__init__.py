"""Preference losses: `cards` is plain data about each loss, `formulas` the maths, `stats` what they see."""
