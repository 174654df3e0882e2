"""Whole programs, from the command line to the files that they write."""
