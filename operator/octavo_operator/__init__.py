"""Octavo's Kubernetes operator: observe -> plan -> apply -> report, whole, on every trigger."""
