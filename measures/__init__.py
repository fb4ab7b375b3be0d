"""Results in, numbers and pictures out."""
