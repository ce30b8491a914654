"""What the other packages build on: tokens, records, files, hardware, tracking; no models."""
