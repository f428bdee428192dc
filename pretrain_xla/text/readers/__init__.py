"""Readers of documents, one for each kind of file that `recognise` knows."""
