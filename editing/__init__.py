"""Behind sample.py: change maps from depth and segments, edits written down, clicks."""
