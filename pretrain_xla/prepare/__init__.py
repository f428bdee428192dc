"""Documents, tokenizer, shards: what makes a dataset to train on, and what looks into one."""
