"""Octavo's hardware table and compute kernels: what a GPU is, and the ops that run on it."""
