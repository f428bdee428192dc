"""Text ↔ token ids: the kinds of tokenizers, loading them, and training new ones."""
