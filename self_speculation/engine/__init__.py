"""The scheduler, rounds of the rows in flight, and kept prefixes."""
