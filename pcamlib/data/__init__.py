"""Data: official layout -> Patches -> batches."""
