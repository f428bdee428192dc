"""Documents: where they come from, how they are read, and which split each belongs to.

`sources.py` opens a source by its name (`source.py` says what one is): files (`documents.py`), a dataset of the Hub (`hub.py`)
or the quick start's corpus (`corpus.py`). For files, `selection.py` picks those that are data, `recognise.py` detects their
format, `open_file.py` decompresses them, and `streams.py`, `archives.py` and `readers/` read documents from them. `split.py`
assigns documents to training or validation.
"""
