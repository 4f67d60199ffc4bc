"""Networks whose features are measured in."""
