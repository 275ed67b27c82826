"""What the entry points call that is no study; each command imports its own."""
