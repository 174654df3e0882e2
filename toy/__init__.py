"""The procedural world that the shipped weights know, and that knows the truth about its pictures."""
