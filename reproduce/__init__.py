"""python -m reproduce: the papers' claims, measured again."""
