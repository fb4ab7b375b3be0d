"""What scripts share around their work: startup, ranks, records, examples, tuning."""
