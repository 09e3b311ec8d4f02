"""What the stages share, one noun a module."""
