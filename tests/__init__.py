"""Tests: a file for each file in front; parity with peers, robustness and programs in folders of their own."""
