"""What everything else builds on: errors, ids, lists, files and their limits. No torch, no sentence-transformers."""
