"""PyTorch networks: built, trained, masked and exported."""
