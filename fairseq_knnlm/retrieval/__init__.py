"""From queries to neighbours."""
