"""Metrics of arrays of features, and what each of them means."""
