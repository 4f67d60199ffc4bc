"""The one road that real and fake rows take from disk to the model."""
