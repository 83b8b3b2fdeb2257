"""`octavo kernels tune`: measures launch choices on the GPU at hand. Nothing here runs while an engine serves."""
