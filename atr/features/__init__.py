"""Images to frozen features, and the store that keeps them: encoder, store, data modules, extraction."""
