"""Our networks beside the peers that they are measured by, on the same random weights."""
