"""Reducers made of a trained selector, one in a file."""
