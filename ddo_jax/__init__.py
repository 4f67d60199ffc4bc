"""Direct Discriminative Optimization (arXiv 2503.01103) in JAX and Flax."""
