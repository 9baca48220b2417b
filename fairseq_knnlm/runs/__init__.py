"""What a command does, from typed options."""
