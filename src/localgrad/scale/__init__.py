"""Memory: what a step takes."""
