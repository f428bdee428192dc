"""Generate text with a trained model: `python generate.py --model runs/quickstart`, then type at the `>>` prompt."""

import sys

from pretrain_xla.cli import main

if __name__ == "__main__":
    main(["generate", *sys.argv[1:]])
