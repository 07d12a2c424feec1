"""Training of EdgeGlass models: configuration, data, trainer, retrieval."""
