"""Reducers built from a trained selector, one in a file."""
