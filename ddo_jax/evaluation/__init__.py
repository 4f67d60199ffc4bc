"""What is measured: protocols, feature networks, metrics, evaluators."""
