"""Samplers: frozen settings, called with a denoiser; they know no model."""
