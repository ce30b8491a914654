"""Images to frozen features: the encoder, extraction, the store on disk, and data modules."""
