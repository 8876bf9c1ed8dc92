"""The study's toy world: video laws with closed-form scores, toy networks that every objective takes, and measures."""
