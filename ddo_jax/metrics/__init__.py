"""Metrics: networks and formulas over arrays; `evaluate` wires them."""
