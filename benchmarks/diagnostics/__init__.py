"""Measurements of the diagnostics: does the probe foresee the outcome, and what does moving a model cost."""
