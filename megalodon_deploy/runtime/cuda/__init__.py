"""State of streams in GPU memory: what is done when, apart from the calls that do it."""
