"""The built-in model: a world of moving shapes, small enough to live in the repository."""
