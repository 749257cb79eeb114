"""What the tests and benchmarks against PyTorch implementations share."""
