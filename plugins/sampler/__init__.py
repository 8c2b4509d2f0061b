"""What draws tokens from logits."""
