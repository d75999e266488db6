"""The studio: a page in the browser over the worker's client. Nothing here imports torch."""
