"""FAISS: which index, train, add, search, device, recall."""
