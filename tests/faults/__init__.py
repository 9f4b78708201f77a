"""Break things on purpose."""
