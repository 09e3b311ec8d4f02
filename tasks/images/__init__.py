"""Images: where they come from, how they are split, and how one becomes the network's input."""
