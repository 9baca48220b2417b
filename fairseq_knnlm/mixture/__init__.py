"""Weights for experts, and the language model that they make together."""
