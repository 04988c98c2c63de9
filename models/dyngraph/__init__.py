"""Models of dynamic graphs: interactions in, link scores out, one at a time or in batches."""
