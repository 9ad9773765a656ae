"""What one step computes: the recipe's mathematics without the machinery."""
