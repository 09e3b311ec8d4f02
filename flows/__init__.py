"""The pipeline as people start, schedule and watch it."""
