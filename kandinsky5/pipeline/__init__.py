"""From a request to a file: encode, denoise, decode, write."""
