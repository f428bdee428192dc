"""What a run leaves behind: checkpoints, settings, metrics, and what it says on the terminal."""
