"""The step, the loop, and what they leave behind: metrics, checkpoints, a summary and a plot."""
