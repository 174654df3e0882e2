"""Figures of lesson 1."""


def draw(folder, dark):
    return []
