"""Training a language model to put embeddings into words, and measuring how well it does."""
