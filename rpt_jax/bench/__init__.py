"""Speed and memory, measured here or on a simulated TPU."""
