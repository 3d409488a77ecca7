"""What the baselines share: the description of a step, the golden steps, and how a peer is checked and timed."""
