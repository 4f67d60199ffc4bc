"""Rounds that need no hand: probe, sweep, alarms, candidates, ledger."""
