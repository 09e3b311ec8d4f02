"""What keeps the pipeline running unwatched."""
