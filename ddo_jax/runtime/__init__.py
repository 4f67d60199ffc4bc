"""Plumbing: devices, checkpoints and records."""
