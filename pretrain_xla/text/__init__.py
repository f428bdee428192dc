"""Documents: where they come from, how they are read, and which split each belongs to."""
