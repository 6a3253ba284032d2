"""Training: one loop, its run folder, and the numbers computed from what it stored."""
