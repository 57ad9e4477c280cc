"""Kernels of rpt_jax; jax only, importable as rpt_jax.kernels."""
