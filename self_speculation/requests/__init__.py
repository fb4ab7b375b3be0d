"""What a caller asks, and the state of a request in flight. Knows nothing of passes."""
