"""What scripts share: startup, ranks, records, examples, tuning."""
