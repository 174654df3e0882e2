"""Inputs that are wrong: one line that says what and what to do, and nothing half-written."""
