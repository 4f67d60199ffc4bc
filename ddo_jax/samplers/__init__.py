"""Samplers: settings that draw from a model; see `contract`."""
