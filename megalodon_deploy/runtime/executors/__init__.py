"""Backends: each runs one call of a bundle's model over state memory of its own."""
