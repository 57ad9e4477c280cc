"""Reinforcement pre-training (arXiv 2506.08007) in JAX: from plain text to a policy that thinks before it predicts."""

__version__ = "0.1.0"
