"""prefopt: which preference-optimisation loss, which beta, which learning rate, and when to stop."""

__version__ = "0.1.0"
