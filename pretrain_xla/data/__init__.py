"""Text → tokens → shards → batches; knows numpy and fsspec, and no device.

Reading order: `documents` and `corpus` give text, behind one door, `sources`; `tokenizer` (and `train_tokenizer`)
turns it into ids; `prepare` writes these as `shards` with a `manifest`. `locate` finds shards, `formats` and `parquet`
recognise them, `dataset` opens and checks them, `supply` brings them to memory (`remote` reads, `cache` keeps), `inspect`
shows what is in them; `batches` says which sequences make up batch number n, in an order from `permutation`; `prefetch`
makes batches ready ahead of the step.
"""
