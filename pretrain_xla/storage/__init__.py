"""Files wherever they are: on a disk, in a bucket, on the Hub or on a web server.

`files.py` writes them atomically, `find.py` lists them, `remote.py` reads them with retries, and `cache.py` keeps local copies.
"""
