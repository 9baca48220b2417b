"""Where the probabilities of a text came from: a record of it, and a page that shows it."""
