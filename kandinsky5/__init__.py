"""Kandinsky 5 on small cards."""
