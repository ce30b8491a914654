"""The micro world: a model, its images and questions, and its training, small enough for a laptop."""
