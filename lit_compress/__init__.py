"""lit-compress."""
