"""Rollouts to a better policy: rewards, advantages, updates, checkpoints, the loop."""
