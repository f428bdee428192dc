"""Train through PyTorch/XLA: `PJRT_DEVICE=TPU python run_pretrain_xla.py --config configs/modern_124m.yaml`."""

from pretrain_xla.cli import run_pretrain

if __name__ == "__main__":
    run_pretrain("xla")
