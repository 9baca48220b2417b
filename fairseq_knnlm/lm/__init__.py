"""A fairseq language model as an encoder of contexts."""
