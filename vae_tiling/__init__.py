"""Decoding a video's latent tile by tile: plans and blending. Knows torch, nothing of K1."""
