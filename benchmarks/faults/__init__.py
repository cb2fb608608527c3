"""Deliberate damage: to finished and half-done runs, to inputs, and growth with the number of datasets."""
