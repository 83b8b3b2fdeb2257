"""Models in object stores (`s3://`) and container registries (`oci://`): found, read in parts, downloaded, kept.

`s3` and `oci` find a model's files; `model` chooses those that an engine reads and reads its geometry by ranges;
`cache` downloads and keeps them. Torch-free. The hub (`hf://`) has a client and a cache of its own.
"""
