"""Queries, documents and judgements, as they come."""
