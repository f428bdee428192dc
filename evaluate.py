"""Evaluate a model: `python evaluate.py --model runs/quickstart --tasks hellaswag lambada --data-dir eval`."""

import sys

from pretrain_xla.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
