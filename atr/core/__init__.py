"""The floor below every other package: tokens, files, hardware, tracking; no models."""
