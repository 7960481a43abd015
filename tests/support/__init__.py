"""Helpers shared by the test suite: a table of invented facts and tiny models trained on it."""
