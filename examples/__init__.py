"""Environments to learn from and to copy; nothing in the package needs them."""
