"""Makes datasets of token shards from documents, and inspects them."""
