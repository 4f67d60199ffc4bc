"""Plumbing: devices, checkpoints, records."""
