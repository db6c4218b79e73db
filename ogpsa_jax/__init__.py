"""OGPSA in JAX."""
