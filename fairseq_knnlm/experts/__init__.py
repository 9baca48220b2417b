"""One file an expert, and a registry of them."""
