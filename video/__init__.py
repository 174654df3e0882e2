"""Behind data.py: clips, the estimators of motion, segments and depth, and shards."""
