"""What the bundle checks before it trains, evaluates or labels."""
