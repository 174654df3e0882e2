"""Code that is fast: kernels compiled at run time, convolutions on a CPU, memory that is kept, blocks compiled or
computed again, Muon's steps."""
