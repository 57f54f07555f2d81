"""What is in a model: its projections, and which of them are adapted."""
