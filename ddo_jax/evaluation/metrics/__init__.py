"""Formulas over arrays of features; the evaluators wire them."""
