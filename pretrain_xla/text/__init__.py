"""Documents: where they come from, how they are read, and which split each belongs to.

`sources.py` opens a source by its name (`source.py` says what one is): files (`documents.py`), a dataset of the Hub (`hub.py`)
or the quick start's corpus (`corpus.py`). Of files, `selection.py` takes those that are data, `recognise.py` tells their
format, `open_file.py` decompresses them, and `streams.py`, `archives.py` and `readers/` read documents out of them. `split.py`
divides documents into training and validation.
"""
