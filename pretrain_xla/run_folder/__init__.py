"""What a run writes and reads back: checkpoints, its config and tokenizer, metrics, a summary, and lines on the terminal.

Read in this order: `build.py` (optimizer and loss, as training and preflight both create them); `checkpoint.py` (save, load,
which ones are kept), with `checkpoint_marker.py` (`checkpoint.json`), `checkpoint_index.py` (`index.json`),
`checkpoint_writing.py` (one process's share, `background.py` its thread), `checkpoint_reading.py`, `checkpoint_open.py`,
`checkpoint_folders.py` and `checkpoint_metadata.py` (untrusted pickles); `data_position.py` (where a resumed run continues in
its data); `metrics.py` with `appender.py` and `trackers.py`; `report.py` and `console.py`; `files.py`, `folders.py` and
`lock.py` (the folder itself).
"""
