"""What all tests share: a real Kubernetes, started only if a test asks for it."""

pytest_plugins = ["plugin"]
