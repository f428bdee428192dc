"""Entry point of `python -m pretrain_xla`."""

from pretrain_xla.cli import main

if __name__ == "__main__":
    main()
