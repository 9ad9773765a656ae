"""What happens beside a training step: progress, EMA, checkpoints, guards."""
