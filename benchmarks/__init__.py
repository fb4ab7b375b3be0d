"""Side-by-side measurements, and what only they and the pages need."""
