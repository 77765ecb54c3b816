"""What all figures share: the canvas that they are drawn on, and how they look. They need matplotlib (extra `plot`)."""
