"""What fewer bits do to a model, measured by an agent and kept."""
