"""One module for each step of the micro models' training, started by make."""
