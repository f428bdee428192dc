"""Train a tokenizer, byte-level BPE or SentencePiece with byte fallback.

python scripts/train_tokenizer.py --source quickstart --output-dir tokenizers/4k --vocab-size 4096
python scripts/train_tokenizer.py --source 'text/ja/*.jsonl.gz' --output-dir tokenizers/ja --kind sentencepiece
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a checkout that is not installed

from pretrain_xla.cli import main

if __name__ == "__main__":
    main(["train-tokenizer", *sys.argv[1:]])
