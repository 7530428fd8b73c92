"""Text, its split by file, its tokens and the batches that training reads."""
