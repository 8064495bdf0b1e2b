"""A batch in training: its rows, packed without padding, and the embeddings of them."""
