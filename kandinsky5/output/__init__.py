"""Frames and latents to files and back: whole files under final names, the request inside each."""
