"""Released weights to Flax params, and back."""
