"""What every other package stands on: tokens, files, hardware, tracking; no model."""
