"""Checkpoints quantised or dequantised once and for all, from file to file in little memory."""
