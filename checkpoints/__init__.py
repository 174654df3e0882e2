"""Weight files: reading them safely, the names of their layouts, and where the published ones of networks/ lie."""
