"""Weight files: reading them safely, and the names and configurations of their layouts."""
