"""What the terms cost: training steps of relaxed models against those of the plain ones, in the same run."""
