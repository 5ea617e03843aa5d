"""What a decode step launches, moves and costs: known without a GPU (plan, dispatch), measured on one (measure)."""
