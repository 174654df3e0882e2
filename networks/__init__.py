"""Networks that the papers lean on, beyond Stable Diffusion: flow, segments, depth, perceptual distance."""
