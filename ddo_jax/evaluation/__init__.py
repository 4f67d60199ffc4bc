"""Scores of images: protocols, feature networks, metrics, evaluators."""
