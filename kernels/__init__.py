"""Code that is fast: what is compiled at run time, and convolutions on a CPU."""
