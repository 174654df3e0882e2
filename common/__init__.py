"""What all programs share: the command line, devices, pictures, whole files."""
