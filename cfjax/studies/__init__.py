"""The study's toy distributions: video laws with closed-form scores, toy networks for every objective, and measures."""
