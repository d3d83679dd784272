"""Stored results shown to people: words, tables, figures, and the terminal while trials run."""
