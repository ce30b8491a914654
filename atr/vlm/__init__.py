"""Vision-language models: the only place that knows them."""
