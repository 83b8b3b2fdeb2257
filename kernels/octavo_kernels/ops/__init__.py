"""One file per op: its torch reference, its kernels, its example inputs."""
