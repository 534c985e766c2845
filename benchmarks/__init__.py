"""Speed, as ratios against a peer in the same run; README.md says how each number is taken."""
