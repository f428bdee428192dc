"""Text to token ids and back: the tokenizers that there are, and how new ones are trained."""
