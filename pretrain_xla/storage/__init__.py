"""Files wherever they lie: on a disk, in a bucket, on the Hub or a web server; and a cache of them."""
