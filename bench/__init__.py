"""python -m bench: speed and memory beside what one would use instead."""
