"""Jobs, their queue, and the one process that runs them with models kept warm."""
