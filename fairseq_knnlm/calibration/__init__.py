"""Score tables, and what is fitted on them."""
