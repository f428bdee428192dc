"""Train with the torch runtime, on GPUs or a CPU: `python run_pretrain.py --config configs/modern_124m.yaml --compile`."""

from pretrain_xla.cli import run_pretrain

if __name__ == "__main__":
    run_pretrain("torch")
