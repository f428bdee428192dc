"""Token shards → batches. NumPy and fsspec; no device.

In the order of a run: `find_shards.py` lists the shards of a folder, `formats.py` (with `headerless.py`, `index_files.py` and
`parquet.py`) recognises the format of each, `shards.py` opens one, `manifest.py` reads the dataset's `dataset.json`,
`dataset.py` checks them all, `shard_loader.py` makes them local and maps them ahead of use, `batches.py` says which sequences
are in which batch (`permutation.py` is the shuffle), and `prefetch.py` prepares batches in the background.
"""
