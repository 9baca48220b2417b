"""Writing text: what reads it as it grows, chooses tokens, drafts and checks them."""
