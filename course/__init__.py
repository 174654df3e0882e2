"""A course of eight lessons on both papers: pages, exercises with their checks and solutions, figures for slides."""
