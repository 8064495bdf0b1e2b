"""Models, embeddings, search, candidates, and teachers that score them."""
